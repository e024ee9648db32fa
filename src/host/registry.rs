//! The private registry: readiness, pushing straight from the bundle, what it holds.

use std::io::Read;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};

use super::config::HostConfig;
use super::{paths, secrets, until};
use crate::bundle::Bundle;
use crate::bundle::lock::Image;
use crate::bundle::manifest::ImageRef;
use crate::bundle::sources::url::chain;
use crate::error::{At, Code, Error, OrCode, Result};
use crate::ids::{Digest, Name, Version};

/// Blobs under way at once, and bytes handed over at once: bounds memory whatever the image's size.
const AT_ONCE: usize = 4;
const CHUNK: usize = 512 << 10;
/// A push that breaks is tried again from its start; the registry is on this host.
const TRIES: u32 = 4;

pub struct Registry {
    client: Client,
    host: String,
    auth: RegistryAuth,
}

impl Registry {
    pub async fn connect(host: &HostConfig) -> Result<Self> {
        let ca = std::fs::read(paths::CA).at(paths::CA)?;
        let config = ClientConfig {
            protocol: ClientProtocol::Https,
            use_monolithic_push: true,
            // Only our CA: this client speaks with nothing else, and the host may have no CA bundle.
            tls_certs_only: vec![Certificate { encoding: CertificateEncoding::Pem, data: ca }],
            connect_timeout: Some(Duration::from_secs(10)),
            read_timeout: Some(Duration::from_secs(120)),
            ..Default::default()
        };
        let client =
            Client::try_from(config).or_code(Code::Registry, "making a client for the private registry")?;
        let auth = RegistryAuth::Basic(secrets::REGISTRY_ACCOUNT.into(), secrets::registry_password()?);
        let registry = Self { client, host: host.registry(), auth };
        registry.client.store_auth_if_needed(&registry.host, &registry.auth).await;
        let any = registry.reference("zd", "ping")?;
        let answer = registry.client.auth(&any, &registry.auth, RegistryOperation::Push).await;
        answer.map_err(|e| registry.failed(&e))?;
        Ok(registry)
    }

    /// Waits until it answers.
    pub async fn ready(host: &HostConfig, limit: Duration) -> Result<()> {
        until(limit, Duration::from_millis(50), async || Self::connect(host).await.map(drop)).await
    }

    fn reference(&self, name: &str, tag: &str) -> Result<Reference> {
        let text = format!("{}/{name}:{tag}", self.host);
        text.parse().or_code(Code::Bug, format!("image name {text}"))
    }

    fn failed(&self, e: &dyn std::error::Error) -> Error {
        Code::Registry
            .err(format!("the private registry {}: {}", self.host, chain(e)))
            .cure("see `systemctl status zd-registry` and `journalctl -u zd-registry`, then run the same command again")
    }

    /// Digest of the manifest under a tag, if there is one.
    pub async fn digest(&self, image: &ImageRef) -> Result<Option<Digest>> {
        let reference = self.reference(image.name.as_str(), image.version.as_str())?;
        match self.client.fetch_manifest_digest(&reference, &self.auth).await {
            Ok(digest) => digest.parse().map(Some).map_err(|e: String| Code::Registry.err(e)),
            Err(oci_client::errors::OciDistributionError::ImageManifestNotFoundError(_)) => Ok(None),
            Err(oci_client::errors::OciDistributionError::RegistryError { .. }) => Ok(None),
            Err(e) => Err(self.failed(&e)),
        }
    }

    /// Versions it holds of a repository.
    pub async fn versions(&self, repository: &Name) -> Result<Vec<Version>> {
        let reference = self.reference(repository.as_str(), "any")?;
        match self.client.list_tags(&reference, &self.auth, None, None).await {
            Ok(tags) => Ok(tags.tags.into_iter().filter_map(|t| t.parse().ok()).collect()),
            Err(oci_client::errors::OciDistributionError::RegistryError { .. }) => Ok(Vec::new()),
            Err(e) => Err(self.failed(&e)),
        }
    }

    /// Pushes an image out of the bundle: blobs side by side, the manifest (which activates) last.
    pub async fn push(&self, bundle: &Bundle, image: &Image, bar: &ProgressBar) -> Result<()> {
        let reference = self.reference(image.reference.name.as_str(), image.reference.version.as_str())?;
        let blobs: Vec<&Digest> = image.layers.iter().chain([&image.config]).collect();
        stream::iter(blobs.into_iter().map(Ok::<_, Error>))
            .try_for_each_concurrent(AT_ONCE, |digest| self.push_blob(&reference, bundle, digest, bar))
            .await?;
        let manifest = bundle.small_blob(&image.manifest)?;
        let media_type = image.media_type.parse().or_code(Code::Bundle, "media type of an image")?;
        self.client
            .push_manifest_raw(&reference, manifest, media_type)
            .await
            .map(drop)
            .map_err(|e| self.failed(&e))
    }

    async fn push_blob(
        &self,
        to: &Reference,
        bundle: &Bundle,
        digest: &Digest,
        bar: &ProgressBar,
    ) -> Result<()> {
        let size = bundle.lock.size_of(digest);
        if self.client.blob_exists(to, digest.as_str()).await.map_err(|e| self.failed(&e))? {
            bar.inc(size);
            return Ok(());
        }
        for attempt in 1.. {
            // Reopened at each try: a stream that broke cannot be replayed.
            let from = bundle.blob(digest)?;
            let counted = bar.clone();
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
                        Err(e) => Some((Err(oci_client::errors::OciDistributionError::IoError(e)), from)),
                    }
                }
            });
            match self.client.push_blob_stream(to, chunks.boxed(), digest.as_str(), Some(size)).await {
                Ok(_) => break,
                Err(e) if attempt == TRIES => return Err(self.failed(&e)),
                Err(_) => tokio::time::sleep(Duration::from_millis(200 << attempt)).await,
            }
        }
        Ok(())
    }
}
