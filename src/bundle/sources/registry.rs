//! Images of a registry: the manifest by its tag or digest, one platform of an index, every blob as it is. Blobs come
//! side by side; each goes on where it broke off, also in the next `pack`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use futures_util::{StreamExt, TryStreamExt, stream};
use oci_client::client::{
    BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol, SizedStream,
};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;

use super::cache::Cache;
use super::image::{Descriptor, OCI_MANIFEST, OciImage, check_platform, damaged};
use super::url::{self, Failure, Rest, Wanted, chain, persevere};
use super::{Blobs, credentials};
use crate::bundle::lock::Image;
use crate::bundle::manifest::{ImageSource, RegistryRef};
use crate::error::{At, Code, OrCode, Result, source_file};
use crate::ids::Digest;
use crate::ui::Ui;

/// Blobs under way at once; Docker fetches three, skopeo six.
const AT_ONCE: usize = 4;
const ACCEPTED: [&str; 4] = [
    OCI_IMAGE_MEDIA_TYPE,
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

pub async fn resolve(
    source: &ImageSource,
    RegistryRef(from): &RegistryRef,
    arch: &str,
    cache: &Cache,
    blobs: &mut Blobs,
    ui: &Ui,
) -> Result<Image> {
    let remote = Remote::connect(source, from, ui).await?;
    let (image, bytes) = remote.image(arch).await?;
    let (manifest, size, path) = cache.put(&bytes)?;
    let mut kept = HashMap::from([(manifest, (size, path))]);
    let mut parts = image.blobs();
    // First, for it says whether the image is of use here.
    if let Some(size) = parts.remove(image.config()) {
        let (config, found) = remote.blob(image.config(), size, cache).await?;
        check_platform(&fs::read(&found.1).at(&found.1)?, arch)?;
        kept.insert(config, found);
    }
    let layers = stream::iter(parts).map(|(digest, size)| remote.blob(digest, size, cache));
    let layers: Vec<_> = layers.buffer_unordered(AT_ONCE).try_collect().await?;
    kept.extend(layers);
    Ok(image.enter(source, &kept, blobs))
}

/// What a manifest is of.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    schema_version: u32,
    media_type: Option<String>,
    /// There in an index only.
    manifests: Option<Vec<Descriptor>>,
}

struct Remote<'a> {
    client: Client,
    from: &'a Reference,
    auth: RegistryAuth,
    /// The image's name in the bundle, for people.
    name: String,
    ui: &'a Ui,
}

impl<'a> Remote<'a> {
    async fn connect(source: &ImageSource, from: &'a Reference, ui: &'a Ui) -> Result<Self> {
        // The library makes such a client too, and panics where that fails.
        reqwest::Client::builder().build().map_err(|e| {
            Code::Source.err(format!("no TLS client: {}", chain(&e))).cure("apt-get install ca-certificates")
        })?;
        let config = ClientConfig {
            protocol: if source.plain_http { ClientProtocol::Http } else { ClientProtocol::Https },
            extra_root_certificates: source.ca.as_deref().map(certificates).transpose()?.unwrap_or_default(),
            connect_timeout: Some(url::CONNECT),
            read_timeout: Some(url::SILENCE),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).or_code(Code::Source, from)?;
        let auth = credentials::of(from.registry()).await?;
        let remote = Self { client, from, auth, name: source.reference.to_string(), ui };
        let login = async || {
            let login = remote.client.auth(from, &remote.auth, RegistryOperation::Pull).await;
            login.map_err(|e| remote.failure(e))
        };
        persevere(&remote.name, from, ui, login).await?;
        Ok(remote)
    }

    /// The image for the platform, and its manifest's bytes.
    async fn image(&self, arch: &str) -> Result<(OciImage, Vec<u8>)> {
        let (digest, bytes, head) = self.manifest(self.from).await?;
        let Some(manifests) = head.manifests else {
            let media_type = head.media_type.unwrap_or_else(|| OCI_MANIFEST.into());
            return Ok((OciImage::parse(digest, media_type, None, &bytes)?, bytes));
        };
        let entry = choose(manifests, arch)?;
        let (found, bytes, _) = self.manifest(&self.from.clone_with_digest(entry.digest.to_string())).await?;
        Ok((OciImage::parse(found, entry.media_type, Some(digest), &bytes)?, bytes))
    }

    async fn manifest(&self, from: &Reference) -> Result<(Digest, Vec<u8>, Head)> {
        let pull = async || {
            let pulled = self.client.pull_manifest_raw(from, &self.auth, &ACCEPTED).await;
            pulled.map_err(|e| self.failure(e))
        };
        let (bytes, _) = persevere(&self.name, from, self.ui, pull).await?;
        let digest = Digest::of(&bytes);
        if from.digest().is_some_and(|wanted| wanted != digest.to_string()) {
            return Err(damaged(format!("{from}: the registry gives a manifest with digest {digest}")));
        }
        let head: Head =
            serde_json::from_slice(&bytes).or_code(Code::Source, format!("{from}: its manifest"))?;
        if head.schema_version != 2 {
            return Err(Code::Source
                .err(format!("{from}: its manifest has schema {}, expected 2", head.schema_version))
                .cure("pull it with the Docker that pushed it, and push it again with a current one"));
        }
        Ok((digest, bytes.into(), head))
    }

    async fn blob(&self, digest: &Digest, size: u64, cache: &Cache) -> Result<(Digest, (u64, PathBuf))> {
        let wanted = Wanted { name: &self.name, sum: digest, says: "the image's manifest" };
        let request = async |have| {
            if have >= size {
                return Ok(None);
            }
            match self.client.pull_blob_stream_partial(self.from, digest.as_str(), have, None).await {
                Ok(BlobResponse::Partial(partial)) => Ok(Some(rest(have, partial))),
                Ok(BlobResponse::Full(whole)) => Ok(Some(rest(0, whole))),
                Err(e) => Err(self.failure(e)),
            }
        };
        let kept = url::download(wanted, self.from, cache, self.ui, request).await?;
        Ok((digest.clone(), kept))
    }

    /// What the library says: worth another try, or not and what to do.
    fn failure(&self, e: OciDistributionError) -> Failure {
        use OciDistributionError as E;
        use OciErrorCode as C;
        let why = match e {
            E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => return self.refused(),
            E::ServerError { code: 404, .. } => return self.missing(),
            E::ServerError { code, message, .. } if code >= 500 || code == 429 => {
                return Failure::Broken(format!("it answers {code}: {}", plain(&message)));
            }
            E::ServerError { code, message, .. } => format!("it answers {code}: {}", plain(&message)),
            E::RegistryError { envelope, .. } => match envelope.errors.first().map(|e| &e.code) {
                Some(C::Unauthorized | C::Denied) => return self.refused(),
                Some(C::ManifestUnknown | C::NameUnknown | C::NotFound) => return self.missing(),
                Some(C::Toomanyrequests) => return Failure::Broken(plain(&envelope.to_string())),
                _ => plain(&envelope.to_string()),
            },
            E::RequestError(e) => {
                let why = chain(&e.without_url());
                // In rustls's words.
                let cure = if why.contains("invalid peer certificate") {
                    "name the file of the CA that signs for it, beside the image: ca = \"plant-ca.pem\""
                } else if why.contains("received corrupt message") {
                    "if it speaks HTTP without TLS and you trust the network to it, say so beside the image: \
                     plain-http = true"
                } else {
                    return Failure::Broken(why);
                };
                return Failure::Final(Code::Source.err(format!("{}: {why}", self.from)).cure(cure));
            }
            E::IoError(e) => return Failure::Broken(chain(&e)),
            e => chain(&e),
        };
        Failure::Final(
            Code::Source
                .err(format!("{}: {why}", self.from))
                .cure("check the name in the manifest, and what the registry logs"),
        )
    }

    fn refused(&self) -> Failure {
        let host = self.from.registry();
        let config = credentials::config().unwrap_or_default();
        let config = config.display();
        let what = match self.auth {
            RegistryAuth::Anonymous => format!("{host} wants credentials, and {config} has none for it"),
            _ => format!(
                "{host} refuses the credentials that {config} has for it, or they do not reach this image"
            ),
        };
        Failure::Final(
            Code::Source.err(format!("{}: {what}", self.from)).cure(format!(
                "docker login {host}, as the user who packs (DOCKER_CONFIG names another folder)"
            )),
        )
    }

    fn missing(&self) -> Failure {
        let (host, repository) = (self.from.registry(), self.from.repository());
        Failure::Final(
            Code::Source.err(format!("{}: there is no such image", self.from)).cure(format!(
                "correct its name; skopeo list-tags docker://{host}/{repository} shows the tags"
            )),
        )
    }
}

fn rest(start: u64, from: SizedStream) -> Rest {
    let chunks = from.stream.map_err(|e| Failure::Broken(chain(&e))).boxed();
    Rest { start, len: from.content_length, chunks }
}

/// A server's words, fit for a terminal.
fn plain(text: &str) -> String {
    text.trim().chars().take(200).flat_map(char::escape_default).collect()
}

/// The entry of an index for the platform; of several, the one for every variant of it.
fn choose(entries: Vec<Descriptor>, arch: &str) -> Result<Descriptor> {
    let mut others = Vec::new();
    let mut found: Option<Descriptor> = None;
    for entry in entries {
        let Some(platform) = &entry.platform else { continue };
        if platform.os != "linux" || platform.architecture != arch {
            others.push(format!("{}/{}", platform.os, platform.architecture));
        } else if found.is_none() || platform.variant.is_none() {
            found = Some(entry);
        }
    }
    // Beside each image BuildKit lists what attests it.
    others.retain(|other| other != "unknown/unknown");
    found.ok_or_else(|| {
        let others = plain(&others.join(", "));
        Code::Source
            .err(format!("the index has no image for linux/{arch}, only for {others}"))
            .cure("build and push it for that platform as well, or pack for another target")
    })
}

fn certificates(path: &Path) -> Result<Vec<Certificate>> {
    let pem = fs::read(path).map_err(|e| source_file(path, e))?;
    let found: Vec<Certificate> = CertificateDer::pem_slice_iter(&pem)
        .map(|der| Ok(Certificate { encoding: CertificateEncoding::Der, data: der?.to_vec() }))
        .collect::<Result<_, rustls::pki_types::pem::Error>>()
        .or_code(Code::Source, path.display())?;
    if found.is_empty() {
        return Err(Code::Source
            .err(format!("{}: expected certificates in PEM", path.display()))
            .cure("openssl x509 -inform der -in FILE makes PEM of one in DER"));
    }
    Ok(found)
}
