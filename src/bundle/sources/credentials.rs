//! Credentials for a registry as `docker login` left them: in Docker's config, or with the helper that it names.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError as Failed, DockerCredential, get_credential_from_reader};
use oci_client::secrets::RegistryAuth;
use tokio::sync::oneshot;

use crate::error::{At, Code, Result};

/// A helper may ask a keyring that is locked.
const HELPER: Duration = Duration::from_secs(60);

/// Docker's config: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
pub fn config() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = var("DOCKER_CONFIG").or_else(|| Some(var("HOME")?.join(".docker")))?;
    Some(dir.join("config.json"))
}

/// Secrets are in what is returned, and in no error.
pub async fn of(host: &str) -> Result<RegistryAuth> {
    let Some(path) = config().filter(|path| path.exists()) else { return Ok(RegistryAuth::Anonymous) };
    let file = File::open(&path).at(&path)?;
    // The name that `docker login` gives its own registry.
    let key = if host == "docker.io" { "https://index.docker.io/v1/" } else { host }.to_owned();
    let (answer, answered) = oneshot::channel();
    // A thread of its own, not the runtime's: zd must be able to end while a helper hangs.
    std::thread::spawn(move || answer.send(get_credential_from_reader(file, &key)));
    let failed = |why: &str| {
        Code::Source
            .err(format!("credentials for {host} from {}: {why}", path.display()))
            .cure(format!("log in again: docker login {host}"))
    };
    match tokio::time::timeout(HELPER, answered).await {
        Ok(Ok(Ok(DockerCredential::UsernamePassword(user, password)))) => {
            Ok(RegistryAuth::Basic(user, password))
        }
        Ok(Ok(Ok(DockerCredential::IdentityToken(_)))) => Err(failed(
            "they are an identity token, expected a user with a password (or an access token in its place)",
        )),
        Ok(Ok(Err(Failed::NoCredentialConfigured))) => Ok(RegistryAuth::Anonymous),
        // What helpers answer where they have none (docker-credential-helpers, credentials.NewErrCredentialsNotFound).
        Ok(Ok(Err(Failed::HelperFailure { stdout, .. }))) if stdout.contains("credentials not found") => {
            Ok(RegistryAuth::Anonymous)
        }
        Ok(Ok(Err(Failed::HelperFailure { helper, .. }))) => Err(failed(&format!("{helper} get failed"))),
        Ok(Ok(Err(e))) => Err(failed(&e.to_string())),
        Ok(Err(_)) | Err(_) => {
            Err(failed(&format!("the helper did not answer within {} s", HELPER.as_secs())))
        }
    }
}
