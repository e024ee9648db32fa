//! The private registry: readiness, what it holds, and pushing straight from the bundle.
//!
//! What listens on the network only reads (distribution's `readonly`, and its unit cannot write either). Pushes
//! go to a second process over the same folder, on a unix socket that only root can open and that is there only
//! while zd pushes.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Certificate, Client, ClientBuilder, Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;

use super::config::HostConfig;
use super::{Host, exec, fs, paths, secrets, systemd, until};
use crate::backup::index::Blob;
use crate::bundle::lock::Image;
use crate::bundle::manifest::ImageRef;
use crate::bundle::sources::url::chain;
use crate::error::{At, Code, Error, OrCode, Result};
use crate::facts;
use crate::ids::{Digest, Name, Version};

const UNIT: &str = "zd-registry.service";
const PUSH_UNIT: &str = "zd-registry-push.service";
/// Blobs under way at once, and bytes handed over at once: bounds memory whatever the image's size.
const AT_ONCE: usize = 4;
const CHUNK: usize = 512 << 10;
/// A push that breaks is tried again from its start; the registry is on this host.
const TRIES: u32 = 4;
/// How long either process may take to answer after it was started.
const READY: Duration = Duration::from_secs(30);
const EVERY: Duration = Duration::from_millis(20);
/// Manifests that a bundle may hold.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                         application/vnd.docker.distribution.manifest.v2+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json";

pub struct Registry {
    client: Client,
    base: String,
    /// None where the socket's folder is what keeps others away.
    password: Option<String>,
    /// What the client's name of the socket leads to.
    #[expect(dead_code, reason = "held open")]
    socket: Option<OwnedFd>,
}

/// `tags/list` of the distribution API.
#[derive(Deserialize)]
struct Tags {
    tags: Option<Vec<String>>,
}

/// An image manifest, of OCI or of Docker (schema 2); what else is in it does not matter here.
#[derive(Deserialize)]
struct Manifest {
    config: Part,
    layers: Vec<Part>,
}

#[derive(Deserialize)]
struct Part {
    digest: Digest,
    size: u64,
}

#[derive(Deserialize)]
struct Catalog {
    repositories: Vec<String>,
}

impl Registry {
    /// The one that reads, known to answer.
    pub async fn connect(host: &HostConfig) -> Result<Self> {
        let ca = std::fs::read(paths::CA).at(paths::CA)?;
        let ca = Certificate::from_pem(&ca).or_code(Code::Io, paths::CA)?;
        // Only our CA: this client speaks with nothing else, and the host may have no CA bundle.
        let client = builder().tls_certs_only([ca]);
        let base = format!("https://{}", host.registry());
        let connected = Self::over(client, base, Some(secrets::registry_password()?)).await;
        connected.map_err(|e| match facts::is_here(host.ip) {
            true => e,
            false => e.cure(format!("{} is on no interface of this host: zd reconfigure --ip auto", host.ip)),
        })
    }

    /// The one that is pushed to; started where it does not run. [`close`] stops it.
    pub async fn open() -> Result<Self> {
        let open = async || {
            // By a handle: its folder is the registry's own.
            let (handle, socket) = fs::socket(Path::new(paths::REGISTRY_SOCKET))?;
            let client = builder().unix_socket(socket).tls_certs_only([]);
            let open = Self::over(client, "http://push".into(), None).await?;
            Ok(Self { socket: Some(handle), ..open })
        };
        // systemctl(1) takes longer to see that it runs than most images take to be pushed.
        if let Ok(open) = open().await {
            return Ok(open);
        }
        systemd::start(PUSH_UNIT).await?;
        until(READY, EVERY, open).await
    }

    async fn over(client: ClientBuilder, base: String, password: Option<String>) -> Result<Self> {
        let client = client.build().or_code(Code::Registry, "making a client for the private registry")?;
        let registry = Self { client, base, password, socket: None };
        registry.expect(registry.request(Method::GET, "/v2/")).await?;
        Ok(registry)
    }

    /// Waits until it answers and only reads.
    pub async fn ready(host: &HostConfig) -> Result<()> {
        let ready = async || match Self::connect(host).await?.reads_only().await? {
            true => Ok(()),
            false => Err(Code::Registry
                .err(format!(
                    "the private registry {} takes pushes, expected that it only reads",
                    host.registry()
                ))
                .cure(format!(
                    "`systemctl cat {UNIT}` shows what was added by hand; then the same command again"
                ))),
        };
        systemd::until_serving(UNIT, READY, EVERY, ready).await
    }

    /// It refuses a push for being one, before it looks at what is pushed.
    pub async fn reads_only(&self) -> Result<bool> {
        let push = self.request(Method::PUT, "/v2/zd/manifests/none").header(CONTENT_TYPE, "text/plain");
        Ok(self.send(push).await?.status() == StatusCode::METHOD_NOT_ALLOWED)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        match &self.password {
            Some(password) => request.basic_auth(secrets::REGISTRY_ACCOUNT, Some(password)),
            None => request,
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        request.send().await.map_err(|e| self.failed(&chain(&e.without_url())))
    }

    /// Any status but success is an error.
    async fn expect(&self, request: RequestBuilder) -> Result<Response> {
        self.find(request).await?.ok_or_else(|| self.failed("404 Not Found"))
    }

    /// As [`Registry::expect`], but None where the thing is not there.
    async fn find(&self, request: RequestBuilder) -> Result<Option<Response>> {
        let answer = self.send(request).await?;
        let status = answer.status();
        match status {
            StatusCode::NOT_FOUND => Ok(None),
            _ if status.is_success() => Ok(Some(answer)),
            _ => {
                let path = answer.url().path().to_owned();
                let body = answer.text().await.unwrap_or_default();
                Err(self.failed(&format!("it answers {path} with {status}: {}", body.trim())))
            }
        }
    }

    fn failed(&self, why: &str) -> Error {
        let unit = if self.password.is_some() { UNIT } else { PUSH_UNIT };
        let shown = self.base.trim_start_matches("https://").trim_start_matches("http://");
        Code::Registry.err(format!("the private registry ({shown}): {why}")).cure(format!(
            "see `systemctl status {unit}` and `zd logs registry`, then run the same command again"
        ))
    }

    /// Digest of the manifest under a tag, if there is one.
    pub async fn digest(&self, image: &ImageRef) -> Result<Option<Digest>> {
        self.digest_of(&image.name, image.version.as_str()).await
    }

    /// The same by a tag, or by the digest itself.
    pub async fn digest_of(&self, name: &Name, tag: &str) -> Result<Option<Digest>> {
        let path = format!("/v2/{name}/manifests/{tag}");
        let request = self.request(Method::HEAD, &path).header(ACCEPT, MANIFESTS);
        let Some(answer) = self.find(request).await? else { return Ok(None) };
        let digest = answer.headers().get("docker-content-digest").and_then(|d| d.to_str().ok());
        let digest = digest.ok_or_else(|| self.failed(&format!("{path} without a digest")))?;
        digest.parse().map(Some).map_err(|e: String| self.failed(&e))
    }

    /// Versions it holds of a repository.
    pub async fn versions(&self, repository: &Name) -> Result<Vec<Version>> {
        let request = self.request(Method::GET, &format!("/v2/{repository}/tags/list"));
        let Some(answer) = self.find(request).await? else { return Ok(Vec::new()) };
        let tags: Tags =
            answer.json().await.or_code(Code::Registry, "the private registry's list of tags")?;
        Ok(tags.tags.into_iter().flatten().filter_map(|t| t.parse().ok()).collect())
    }

    /// Repositories it has (of one page, 1,000: more than a site has services).
    pub async fn repositories(&self) -> Result<Vec<Name>> {
        let answer = self.expect(self.request(Method::GET, "/v2/_catalog?n=1000")).await?;
        let catalog: Catalog =
            answer.json().await.or_code(Code::Registry, "the private registry's catalog")?;
        Ok(catalog.repositories.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Removes a manifest with its tags; its blobs go with [`collect_garbage`].
    pub async fn remove(&self, repository: &Name, manifest: &Digest) -> Result<()> {
        let request = self.request(Method::DELETE, &format!("/v2/{repository}/manifests/{manifest}"));
        self.find(request).await.map(drop)
    }

    /// An image as the registry has it, with the sizes of its blobs, and its manifest; None where it is not there.
    pub async fn image(&self, reference: &ImageRef, digest: &Digest) -> Result<Option<(Image, Vec<Blob>)>> {
        let path = format!("/v2/{}/manifests/{digest}", reference.name);
        let request = self.request(Method::GET, &path).header(ACCEPT, MANIFESTS);
        let Some(answer) = self.find(request).await? else { return Ok(None) };
        let kind = answer.headers().get(CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or_default();
        let media_type = kind.to_owned();
        let bytes = answer.bytes().await.map_err(|e| self.failed(&chain(&e.without_url())))?;
        if Digest::of(&bytes) != *digest {
            return Err(self.failed(&format!("{path} has other bytes than its name says")));
        }
        let form: Manifest = serde_json::from_slice(&bytes).or_code(Code::Registry, &path)?;
        let blob = |part: &Part| Blob { digest: part.digest.clone(), size: part.size };
        let mut blobs = vec![Blob { digest: digest.clone(), size: bytes.len() as u64 }, blob(&form.config)];
        blobs.extend(form.layers.iter().map(blob));
        let image = Image {
            reference: reference.clone(),
            media_type,
            manifest: digest.clone(),
            config: form.config.digest,
            layers: form.layers.into_iter().map(|layer| layer.digest).collect(),
            index: None,
            unpacked: 0,
        };
        Ok(Some((image, blobs)))
    }

    /// The bytes of an image's manifest, or of another of its blobs.
    pub async fn download(&self, image: &Image, digest: &Digest) -> Result<Response> {
        let kind = if image.manifest == *digest { "manifests" } else { "blobs" };
        let request = self.request(Method::GET, &format!("/v2/{}/{kind}/{digest}", image.reference.name));
        self.expect(request.header(ACCEPT, MANIFESTS)).await
    }

    /// Pushes an image that is carried, under a tag or its digest: blobs side by side, the manifest (which activates)
    /// last.
    pub async fn push(&self, host: &Host<'_>, image: &Image, tag: &str, bar: &ProgressBar) -> Result<()> {
        let name = &image.reference.name;
        let blobs: Vec<&Digest> = image.layers.iter().chain([&image.config]).collect();
        stream::iter(blobs.into_iter().map(Ok::<_, Error>))
            .try_for_each_concurrent(AT_ONCE, |digest| self.push_blob(name, host, digest, bar))
            .await?;
        let manifest = self
            .request(Method::PUT, &format!("/v2/{name}/manifests/{tag}"))
            .header(CONTENT_TYPE, &image.media_type)
            .body(host.small_blob(&image.manifest)?);
        self.expect(manifest).await.map(drop)
    }

    async fn push_blob(&self, to: &Name, host: &Host<'_>, digest: &Digest, bar: &ProgressBar) -> Result<()> {
        if self.find(self.request(Method::HEAD, &format!("/v2/{to}/blobs/{digest}"))).await?.is_some() {
            return Ok(());
        }
        for attempt in 1.. {
            // Reopened at each try: a stream that broke cannot be replayed.
            match self.upload(to, host, digest, bar).await {
                Ok(()) => break,
                Err(e) if attempt == TRIES => return Err(e),
                Err(_) => tokio::time::sleep(Duration::from_millis(200 << attempt)).await,
            }
        }
        Ok(())
    }

    async fn upload(&self, to: &Name, host: &Host<'_>, digest: &Digest, bar: &ProgressBar) -> Result<()> {
        let begun = self.expect(self.request(Method::POST, &format!("/v2/{to}/blobs/uploads/"))).await?;
        let place = begun.headers().get(LOCATION).and_then(|l| l.to_str().ok());
        // Relative: told so in its configuration. It has a query already.
        let place = place.ok_or_else(|| self.failed("an upload without a place"))?;
        let ((from, size), counted) = (host.blob(digest)?, bar.clone());
        let chunks = stream::unfold(from, move |mut from| {
            let counted = counted.clone();
            async move {
                // One local read of at most CHUNK: shorter than handing it to another thread.
                let mut chunk = vec![0u8; CHUNK];
                match from.read(&mut chunk) {
                    Ok(0) => None,
                    Ok(n) => {
                        chunk.truncate(n);
                        counted.inc(n as u64);
                        Some((Ok(Bytes::from(chunk)), from))
                    }
                    Err(e) => Some((Err(e), from)),
                }
            }
        });
        let upload = self
            .request(Method::PUT, &format!("{place}&digest={digest}"))
            .header(CONTENT_LENGTH, size)
            .body(Body::wrap_stream(chunks.boxed()));
        self.expect(upload).await.map(drop)
    }
}

/// Ends the time in which it can be pushed to; good where that is over.
pub async fn close() -> Result<()> {
    systemd::stop(PUSH_UNIT).await
}

/// Removes blobs that no manifest names. Call it while nothing can be pushed.
pub async fn collect_garbage() -> Result<()> {
    let config = format!("{}/push.json", paths::REGISTRY_ETC);
    exec::run(&["runuser", "-u", paths::REGISTRY_USER, "--", "docker-registry", "garbage-collect", &config])
        .await
        .map(drop)
}

fn builder() -> ClientBuilder {
    Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(Duration::from_secs(120))
}
