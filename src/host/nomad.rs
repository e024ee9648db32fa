//! Nomad: ACL, node, snapshots and the ids of its client. HTTP API v1 on loopback.

use std::path::Path;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::api::Api;
use super::secrets::{self, Token};
use super::{fs, paths, stores, systemd, until};
use crate::error::{Code, OrCode, Result};

pub const UNIT: &str = "nomad.service";
const SNAPSHOT: &str = "/v1/operator/snapshot";
pub const READY: Duration = Duration::from_secs(90);
pub const EVERY: Duration = Duration::from_millis(200);
/// What zd calls its tokens; the first one has a name of Nomad's own.
const TOKEN: &str = "zd";

pub fn connect() -> Result<Api> {
    Api::nomad(Some(secrets::token(Token::NomadManagement)?))
}

/// What keeps Nomad from running containers, or its version.
pub async fn version() -> Result<String> {
    version_of(&connect()?).await
}

async fn version_of(api: &Api) -> Result<String> {
    let bad = |what: String| Code::Stack.err(what).cure("zd logs nomad");
    // A Nomad without a leader answers this with a 500.
    let nodes = api.get("/v1/nodes").await?;
    let node = &nodes[0];
    if node["Status"] != "ready" || node["SchedulingEligibility"] != "eligible" {
        return Err(bad(format!(
            "Nomad's node is {} and {}, expected ready and eligible",
            node["Status"].as_str().unwrap_or("not there"),
            node["SchedulingEligibility"].as_str().unwrap_or("unknown")
        )));
    }
    let docker = &node["Drivers"]["docker"];
    if docker["Healthy"] != true {
        let why = docker["HealthDescription"].as_str().unwrap_or("not found");
        return Err(bad(format!("Nomad's docker driver is not healthy: {why}")));
    }
    Ok(node["Version"].as_str().unwrap_or("?").to_owned())
}

/// All of its state, as `nomad operator snapshot save` would save it.
pub async fn snapshot() -> Result<Vec<u8>> {
    connect()?.download(SNAPSHOT).await
}

/// It has a leader and knows the token in our file; an error where it does not tell.
pub async fn knows_token() -> Result<bool> {
    let Ok(api) = connect() else { return Ok(false) };
    api.tells_token().await
}

/// Puts a snapshot back. A Nomad that has just begun is entered by a first token, which the snapshot forgets.
pub async fn restore(snapshot: &[u8]) -> Result<()> {
    let enter = async || bootstrap(&Api::nomad(None)?, None, reset).await;
    let first = systemd::until_serving(UNIT, READY, EVERY, enter).await?;
    Api::nomad(Some(first))?.upload(SNAPSHOT, snapshot).await?;
    let unknown = || Code::Stack.err("Nomad does not know the token of the backup").cure("zd logs nomad");
    let known = async || knows_token().await?.then_some(()).ok_or_else(unknown);
    until(READY, EVERY, known).await?;
    renew_root_key(&connect()?).await?;
    // The client polls from the index of the empty server that it registered with, which may lie beyond the snapshot's:
    // it would never receive its allocations. A restart resets that index.
    systemd::restart(UNIT).await?;
    until(READY, EVERY, known).await?;
    until(READY, EVERY, async || has_registered(&connect()?).await).await
}

/// The client has had an answer to a heartbeat. The status of its node in the server may still be that of the snapshot.
async fn has_registered(api: &Api) -> Result<()> {
    let agent = api.get("/v1/agent/self").await?;
    match agent["stats"]["client"]["heartbeat_ttl"].as_str() {
        Some("0s") => {
            Err(Code::Stack.err("Nomad's client has not registered with its server").cure("zd logs nomad"))
        }
        _ => Ok(()),
    }
}

/// Nomad signs the identity of each allocation, and places none without its root key, which no snapshot has. Before Nomad
/// 1.4 there is no such key.
async fn renew_root_key(api: &Api) -> Result<()> {
    const PATH: &str = "/v1/operator/keyring/rotate";
    let reply = api.send(Method::PUT, PATH, None::<&()>).await?;
    match reply.status {
        StatusCode::NOT_FOUND => Ok(()),
        _ => api.success(PATH, reply).map(drop),
    }
}

fn reset(index: &str) -> Result<()> {
    let file = Path::new(paths::NOMAD_DATA).join("server/acl-bootstrap-reset");
    fs::write(&file, index.as_bytes(), 0o600, None)
}

/// A server that begins anew gets the token that there was, and its client the ids.
pub async fn begin_anew() -> Result<()> {
    let known = secrets::token(Token::NomadManagement).ok();
    let enter = async || {
        let api = Api::nomad(known.clone())?;
        // The server is the one before where only its client begins anew.
        if known.is_some() && api.tells_token().await? {
            return Ok(known.clone().unwrap_or_default());
        }
        bootstrap(&Api::nomad(None)?, known.as_deref(), reset).await
    };
    let secret = systemd::until_serving(UNIT, READY, EVERY, enter).await?;
    secrets::keep(Token::NomadManagement, &secret)?;
    set_up().await
}

/// Copies the ids by which servers know this host's client. Without them it is another node, and the containers that run
/// are nobody's.
fn keep_ids() -> Result<()> {
    copy_ids(&stores::nomad_client(), Path::new(paths::NOMAD_IDS))
}

/// Puts back those that are lost.
pub fn put_back_ids() -> Result<()> {
    let client = stores::nomad_client();
    let lost =
        |name: &&str| !matches!(fs::read_if_any(&client.join(name)), Ok(Some(id)) if stores::is_id(&id));
    match stores::NOMAD_IDS.iter().any(lost) && Path::new(paths::NOMAD_IDS).is_dir() {
        true => copy_ids(Path::new(paths::NOMAD_IDS), &client),
        false => Ok(()),
    }
}

fn copy_ids(from: &Path, to: &Path) -> Result<()> {
    if !to.is_dir() {
        fs::make_dir(to, 0o700, None)?;
    }
    for name in stores::NOMAD_IDS {
        let (id, to) = (fs::read_if_any(&from.join(name))?.unwrap_or_default(), to.join(name));
        if stores::is_id(&id) && fs::read_if_any(&to)?.as_ref() != Some(&id) {
            fs::write(&to, &id, 0o600, None)?;
        }
    }
    Ok(())
}

/// Waits for the leader, takes the ACL's first token, waits for the node and its docker driver.
pub async fn set_up() -> Result<()> {
    if secrets::token(Token::NomadManagement).is_err() {
        let enter = async || bootstrap(&Api::nomad(None)?, None, reset).await;
        let secret = systemd::until_serving(UNIT, READY, EVERY, enter).await?;
        secrets::keep(Token::NomadManagement, &secret)?;
    }
    systemd::until_serving(UNIT, READY, EVERY, async || version().await.map(drop)).await?;
    keep_ids()
}

/// Nomad names the first token itself, unless it is given one (which Nomad takes since 1.5). A run that was killed between its answer and our file has lost it:
/// then the way that Nomad provides is taken (a file with the reset index, see "Reset ACL bootstrap").
async fn bootstrap(api: &Api, known: Option<&str>, reset: impl FnOnce(&str) -> Result<()>) -> Result<String> {
    let body = known.map(|secret| json!({ "BootstrapSecret": secret }));
    let reply = api.send(Method::PUT, "/v1/acl/bootstrap", body.as_ref()).await?;
    if reply.status.is_success() {
        let token: Value = serde_json::from_str(&reply.body).or_code(Code::Stack, "Nomad's first token")?;
        let secret = token["SecretID"].as_str().ok_or_else(|| Code::Stack.err("Nomad's token is empty"))?;
        return Ok(secret.to_owned());
    }
    let index = reply.body.split("reset index: ").nth(1).and_then(|rest| rest.split(')').next());
    if let Some(index) = index {
        reset(index)?;
    }
    Err(api.refused("/v1/acl/bootstrap", &reply))
}

/// Restarted, and waited for as in [`set_up`].
pub async fn restart() -> Result<()> {
    systemd::restart(UNIT).await?;
    set_up().await
}

/// Another management token, beside the present one; its file names the new one then.
pub async fn renew_token() -> Result<()> {
    let secret = another_token(&connect()?).await?;
    secrets::keep(Token::NomadManagement, &secret)
}

async fn another_token(api: &Api) -> Result<String> {
    let request = json!({ "Name": TOKEN, "Type": "management" });
    let token = api.put("/v1/acl/token", &request).await?;
    let secret = token["SecretID"].as_str().ok_or_else(|| Code::Stack.err("Nomad's token is empty"))?;
    Ok(secret.to_owned())
}

/// Removes the tokens that were zd's before: Nomad's first one too, but nobody else's.
pub async fn forget_old_tokens() -> Result<()> {
    forget_others(&connect()?).await
}

async fn forget_others(api: &Api) -> Result<()> {
    let current = api.get("/v1/acl/token/self").await?;
    let tokens = api.get("/v1/acl/tokens").await?;
    for token in tokens.as_array().into_iter().flatten() {
        let ours = token["Name"] == TOKEN || token["Name"] == "Bootstrap Token";
        if let (true, Some(id)) = (ours, token["AccessorID"].as_str())
            && token["AccessorID"] != current["AccessorID"]
        {
            api.delete(&format!("/v1/acl/token/{id}")).await?;
        }
    }
    Ok(())
}

/// The gossip key that stands in Nomad's configuration becomes the only one.
pub async fn renew_gossip_key() -> Result<()> {
    let config = secrets::private_config(paths::NOMAD_ETC)?;
    use_gossip_key(&connect()?, config["server"]["encrypt"].as_str().unwrap_or_default()).await
}

async fn use_gossip_key(api: &Api, key: &str) -> Result<()> {
    let change = async |verb: &str, key: &str| {
        api.put(&format!("/v1/agent/keyring/{verb}"), &json!({ "Key": key })).await.map(drop)
    };
    change("install", key).await?;
    change("use", key).await?;
    let ring = api.get("/v1/agent/keyring/list").await?;
    for (old, _) in ring["Keys"].as_object().into_iter().flatten().filter(|(known, _)| *known != key) {
        change("remove", old).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::api::NOMAD;
    use crate::host::jobs;
    use crate::host::replay::{UNKNOWN, versions};

    #[tokio::test]
    async fn the_first_token() {
        for nomad in versions(NOMAD) {
            let replay = nomad.replay(&["bootstrap-no-leader", "bootstrap"]).await;
            let api = replay.api(None);
            let reset = |index: &str| panic!("reset to {index}");
            let e = bootstrap(&api, None, reset).await.unwrap_err();
            assert!(e.what.ends_with("500 Internal Server Error: No cluster leader"), "{}", e.what);
            assert_eq!(bootstrap(&api, None, reset).await.unwrap(), "00000000-0000-4000-8000-000000000007");
        }
    }

    #[tokio::test]
    async fn a_first_token_that_was_lost_is_made_again() {
        for nomad in versions(NOMAD) {
            let replay = nomad.replay(&["bootstrap-lost"]).await;
            let api = replay.api(None);
            let refusal = replay.next_answer();
            let mut written = String::new();
            let reset = |index: &str| {
                written = index.to_owned();
                Ok(())
            };
            assert!(bootstrap(&api, None, reset).await.is_err());
            assert_eq!(refusal, format!("ACL bootstrap already done (reset index: {written})"));
            assert!(written.parse::<u64>().unwrap() > 0);
            let unused = |_: &str| panic!("reset again");
            assert_eq!(bootstrap(&api, None, unused).await.unwrap(), "00000000-0000-4000-8000-000000000006");
        }
    }

    #[tokio::test]
    async fn a_node_that_runs_containers() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = nomad.asked(&["ready"], Token::NomadManagement).await;
            assert_eq!(version_of(&api).await.unwrap(), nomad.version);
        }
    }

    #[tokio::test]
    async fn nodes_that_do_not() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = nomad.asked(&["starting", "docker-unhealthy"], Token::NomadManagement).await;
            let starting = version_of(&api).await.unwrap_err();
            // It is initializing for a moment only, and before that not there.
            let found = ["initializing and eligible", "not there and unknown"];
            let said = found.map(|found| format!("Nomad's node is {found}, expected ready and eligible"));
            assert!(said.contains(&starting.what), "{}", starting.what);
            let unhealthy = version_of(&api).await.unwrap_err();
            assert_eq!(
                unhealthy.what,
                "Nomad's docker driver is not healthy: Failed to connect to docker daemon"
            );
        }
    }

    #[tokio::test]
    async fn no_leader_and_no_known_token() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = nomad.asked(&["no-leader", "token-unknown"], Token::NomadManagement).await;
            let api = api.with(UNKNOWN);
            let e = version_of(&api).await.unwrap_err();
            let said = "Nomad answers /v1/nodes with 500 Internal Server Error: No cluster leader";
            assert_eq!((e.code, e.what.as_str()), (Code::Stack, said));
            let e = version_of(&api).await.unwrap_err();
            // What versions say of a token that they do not know.
            let said = ["ACL token not found", "Permission denied"]
                .map(|said| format!("Nomad answers /v1/nodes with 403 Forbidden: {said}"));
            assert!(e.code == Code::Stack && said.contains(&e.what), "{}", e.what);
        }
    }

    #[tokio::test]
    async fn a_nomad_that_does_not_answer() {
        // A port that was free a moment ago.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let api = Api::replayed(NOMAD, format!("http://{free}").leak(), None).unwrap();
        let e = version_of(&api).await.unwrap_err();
        assert_eq!(e.code, Code::Stack);
        assert!(e.what.starts_with("Nomad does not answer: "), "{}", e.what);
        assert!(e.cure.unwrap().starts_with("systemctl start nomad, "));
        assert!(!jobs::keeps_ending(&api, "hello-green").await);
        let e = jobs::explain(&api, "hello-green").await.unwrap_err();
        assert!(e.what.starts_with("Nomad does not answer: "), "{}", e.what);
    }

    #[tokio::test]
    async fn tokens_and_gossip_keys_are_renewed() {
        for nomad in versions(NOMAD) {
            let (_replay, api) =
                nomad.asked(&["token-renew", "tokens-forget", "keyring"], Token::NomadManagement).await;
            assert_eq!(another_token(&api).await.unwrap(), "00000000-0000-4000-8000-000000000012");
            // Nomad's first token goes, the site's stays.
            forget_others(&api).await.unwrap();
            use_gossip_key(&api, "MjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjI=").await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_snapshot_is_what_brings_the_token_back() {
        for nomad in versions(NOMAD) {
            let (replay, api) =
                nomad.asked(&["snapshot", "bootstrap", "snapshot-restore"], Token::NomadManagement).await;
            let snapshot = api.download(SNAPSHOT).await.unwrap();
            assert_eq!(snapshot[..2], [0x1f, 0x8b], "gzip");
            // A Nomad that has just begun is entered by a first token, which the snapshot forgets.
            let reset = |index: &str| panic!("reset to {index}");
            let first = bootstrap(&replay.api(None), None, reset).await.unwrap();
            assert!(!api.tells_token().await.unwrap());
            assert_eq!(snapshot, replay.next_bytes());
            api.with(&first).upload(SNAPSHOT, &snapshot).await.unwrap();
            assert!(api.tells_token().await.unwrap());
            assert!(!api.with(&first).tells_token().await.unwrap());
        }
    }

    #[tokio::test]
    async fn snapshots_that_cannot_be_had_or_put_back() {
        for nomad in versions(NOMAD) {
            let recordings = ["snapshot-no-leader", "snapshot-denied", "snapshot-damaged"];
            let (replay, api) = nomad.asked(&recordings, Token::NomadManagement).await;
            for (api, said) in [
                (&api, &["500 Internal Server Error: No cluster leader"][..]),
                // Elsewhere Nomad 1.1 says 403 of the same.
                (
                    &api.with(UNKNOWN),
                    &["400 Bad Request: ACL token not found", "403 Forbidden: Permission denied"],
                ),
            ] {
                let e = api.download(SNAPSHOT).await.unwrap_err();
                let what = |said: &&str| format!("Nomad answers {SNAPSHOT} with {said}");
                assert!(e.code == Code::Stack && said.iter().map(what).any(|what| what == e.what), "{e:?}");
            }
            let first = api.with("00000000-0000-4000-8000-000000000007");
            let e = first.upload(SNAPSHOT, &replay.next_bytes()).await.unwrap_err();
            let said = "500 Internal Server Error: failed to restore from snapshot";
            assert!(e.what.contains(said), "{}", e.what);
        }
    }
}
