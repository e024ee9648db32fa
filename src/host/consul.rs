//! Consul: leader, ACL, and the few keys zd keeps there. HTTP API v1 on loopback.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::api::Api;
use super::secrets::{self, Token};
use super::{paths, systemd, until};
use crate::error::{Code, Result};
use crate::ids::Name;

pub const UNIT: &str = "consul.service";
const SNAPSHOT: &str = "/v1/snapshot";
const READY: Duration = Duration::from_secs(60);
const EVERY: Duration = Duration::from_millis(100);

/// What each user of Consul may do (Consul ACL rules), and the token it does it with.
fn policies(node: &str) -> [(Token, String); 4] {
    let nodes = "node_prefix \"\" { policy = \"read\" }";
    [
        (Token::ConsulAgent, format!("node \"{node}\" {{ policy = \"write\" }}\n{nodes}")),
        (
            Token::ConsulNomad,
            format!(
                "agent_prefix \"\" {{ policy = \"read\" }}\n{nodes}\n\
                 service_prefix \"\" {{ policy = \"write\" }}"
            ),
        ),
        (Token::ConsulTemplate, "key_prefix \"zd/services/\" { policy = \"read\" }".into()),
        (
            Token::ConsulZd,
            format!(
                "agent_prefix \"\" {{ policy = \"read\" }}\n{nodes}\n\
                 service_prefix \"\" {{ policy = \"read\" }}\n\
                 key_prefix \"zd/\" {{ policy = \"write\" }}\noperator = \"read\""
            ),
        ),
    ]
}

/// Leader elected, every token accepted.
pub async fn is_ready() -> bool {
    knows_tokens().await.unwrap_or(false)
}

/// Every token accepted; an error where Consul does not tell.
pub async fn knows_tokens() -> Result<bool> {
    for (token, _) in policies("") {
        let Ok(secret) = secrets::token(token) else { return Ok(false) };
        if !Api::consul(Some(secret))?.tells_token().await? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// All of its state, as `consul snapshot` would save it.
pub async fn snapshot() -> Result<Vec<u8>> {
    management()?.download(SNAPSHOT).await
}

/// Puts a snapshot back; the tokens of then are the ones that count again.
pub async fn restore(snapshot: &[u8]) -> Result<()> {
    let api = management()?;
    wait(&api).await?;
    api.upload(SNAPSHOT, snapshot).await?;
    let unknown = || Code::Stack.err("Consul does not know the tokens of the backup").cure("zd logs consul");
    until(READY, EVERY, async || is_ready().await.then_some(()).ok_or_else(unknown)).await
}

/// Waits for the leader and brings the ACL about: one policy and one token for each user of Consul.
pub async fn set_up(node: &str) -> Result<()> {
    let api = management()?;
    wait(&api).await?;
    for (token, rules) in policies(node) {
        ensure(&api, token, &rules, &secrets::token(token)?).await?;
    }
    Ok(())
}

/// Restarted, and waited for as in [`set_up`].
pub async fn restart(node: &str) -> Result<()> {
    systemd::restart(UNIT).await?;
    set_up(node).await
}

async fn wait(api: &Api) -> Result<()> {
    // The ACL system starts a moment after the leader does, and says so with a 500.
    systemd::until_serving(UNIT, READY, EVERY, async || api.get("/v1/acl/policies").await.map(drop)).await
}

/// The policy with these rules, and a token that has it.
async fn ensure(api: &Api, token: Token, rules: &str, secret: &str) -> Result<()> {
    let name = format!("zd-{}", token.name());
    let known = policy(api, &format!("/v1/acl/policy/name/{name}")).await?;
    let policy = json!({ "Name": name, "Rules": rules });
    match known["ID"].as_str() {
        Some(id) => api.put(&format!("/v1/acl/policy/{id}"), &policy).await?,
        None => api.put("/v1/acl/policy", &policy).await?,
    };
    if api.with(secret).knows_token().await {
        return Ok(());
    }
    let token = json!({ "SecretID": secret, "Description": name, "Policies": [{ "Name": name }] });
    api.put("/v1/acl/token", &token).await.map(drop)
}

/// The policy, or null where there is none, which Consul says with a 404 or a 403. Any other
/// refusal is no word that it is not there.
async fn policy(api: &Api, path: &str) -> Result<Value> {
    let reply = api.send(Method::GET, path, None::<&()>).await?;
    match reply.status {
        StatusCode::NOT_FOUND => Ok(Value::Null),
        StatusCode::FORBIDDEN if reply.body.contains("ACL not found") => Ok(Value::Null),
        _ => api.success(path, reply),
    }
}

fn management() -> Result<Api> {
    Api::consul(Some(secrets::token(Token::ConsulManagement)?))
}

/// Another token for each user of Consul, beside the one it has; its file names the new one then.
pub async fn renew_tokens(node: &str) -> Result<()> {
    let secret = secrets::uuid()?;
    renew_management(&management()?, &secret).await?;
    secrets::keep(Token::ConsulManagement, &secret)?;
    let api = management()?;
    for (token, rules) in policies(node) {
        let secret = secrets::uuid()?;
        ensure(&api, token, &rules, &secret).await?;
        secrets::keep(token, &secret)?;
    }
    Ok(())
}

async fn renew_management(api: &Api, secret: &str) -> Result<()> {
    let policies = json!([{ "Name": "global-management" }]);
    let description = format!("zd-{}", Token::ConsulManagement.name());
    let token = json!({ "SecretID": secret, "Description": description, "Policies": policies });
    api.put("/v1/acl/token", &token).await.map(drop)
}

/// Removes the tokens that were zd's before: Consul's first one too, but nobody else's.
pub async fn forget_old_tokens() -> Result<()> {
    let api = management()?;
    let mut current = Vec::new();
    for token in Token::CONSUL {
        current.push(accessor(&api.with(&secrets::token(token)?)).await?);
    }
    forget_others(&api, &current).await
}

async fn accessor(api: &Api) -> Result<String> {
    let token = api.get("/v1/acl/token/self").await?;
    Ok(token["AccessorID"].as_str().unwrap_or_default().to_owned())
}

async fn forget_others(api: &Api, current: &[String]) -> Result<()> {
    let tokens = api.get("/v1/acl/tokens").await?;
    for token in tokens.as_array().into_iter().flatten() {
        let text = |key: &str| token[key].as_str().unwrap_or_default();
        let (id, description) = (text("AccessorID"), text("Description"));
        // What versions of Consul call the first token.
        let first = ["Master Token", "Initial Management Token"].contains(&description);
        if (first || description.starts_with("zd-consul-")) && !current.iter().any(|c| c == id) {
            api.delete(&format!("/v1/acl/token/{id}")).await?;
        }
    }
    Ok(())
}

/// The gossip key that stands in Consul's configuration becomes the only one.
pub async fn renew_gossip_key() -> Result<()> {
    let config = secrets::private_config(paths::CONSUL_ETC)?;
    use_gossip_key(&management()?, config["encrypt"].as_str().unwrap_or_default()).await
}

async fn use_gossip_key(api: &Api, key: &str) -> Result<()> {
    const KEYRING: &str = "/v1/operator/keyring";
    let change =
        async |method, key: &str| api.call(method, KEYRING, Some(&json!({ "Key": key }))).await.map(drop);
    change(Method::POST, key).await?;
    change(Method::PUT, key).await?;
    let rings = api.get(KEYRING).await?;
    for (old, _) in rings[0]["Keys"].as_object().into_iter().flatten().filter(|(known, _)| *known != key) {
        change(Method::DELETE, old).await?;
    }
    Ok(())
}

pub fn zd() -> Result<Api> {
    Api::consul(Some(secrets::token(Token::ConsulZd)?))
}

/// A key's value and its ModifyIndex; index 0 where it is not there. `consistent`: just after a restart
/// the other modes answer from a log that is still being replayed, with values of the past.
pub async fn read(api: &Api, key: &str) -> Result<(Value, u64)> {
    let found = api.get(&format!("/v1/kv/{key}?consistent")).await?;
    let entry = &found[0];
    let bytes = BASE64.decode(entry["Value"].as_str().unwrap_or_default()).unwrap_or_default();
    let value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    Ok((value, entry["ModifyIndex"].as_u64().unwrap_or(0)))
}

/// Writes all keys or none: each only if it is still at the index it was read at (check-and-set; 0: only
/// if it is not there). False where somebody else was faster.
pub async fn write(api: &Api, entries: &[(String, Value, u64)]) -> Result<bool> {
    let operations: Vec<Value> = entries
        .iter()
        .map(|(key, value, index)| {
            json!({ "KV": {
                "Verb": "cas", "Key": key, "Index": index, "Value": BASE64.encode(format!("{value}")),
            } })
        })
        .collect();
    let reply = api.send(Method::PUT, "/v1/txn", Some(&operations)).await?;
    match reply.status {
        // A missing permission has the same status.
        StatusCode::CONFLICT if reply.body.contains("index is stale") => Ok(false),
        status if status.is_success() => Ok(true),
        _ => Err(api.refused("/v1/txn", &reply)),
    }
}

/// A key gets a value whatever stood there; tries again where somebody else was faster.
pub async fn set(api: &Api, key: &str, value: &Value) -> Result<()> {
    for _ in 0..5 {
        let (found, index) = read(api, key).await?;
        if found == *value || write(api, &[(key.to_owned(), value.clone(), index)]).await? {
            return Ok(());
        }
    }
    Err(Code::Stack.err(format!("Consul key {key} is changed by somebody else all the time")))
}

/// What Consul was told of a service, but for the audit log.
pub async fn forget(api: &Api, service: &Name) -> Result<()> {
    // The slash: no other service's name begins so.
    api.delete(&format!("/v1/kv/zd/services/{service}/?recurse")).await.map(drop)
}

/// Version, of a Consul with a leader.
pub async fn version() -> Result<String> {
    version_of(&zd()?).await
}

async fn version_of(api: &Api) -> Result<String> {
    // Asked first: until there is a leader no token is known.
    if !api.has_leader().await? {
        return Err(Code::Stack.err("Consul has no leader").cure("zd logs consul"));
    }
    let agent = api.get("/v1/agent/self").await?;
    Ok(agent["Config"]["Version"].as_str().unwrap_or("?").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::api::CONSUL;
    use crate::host::replay::{Recorded, UNKNOWN, secret, versions};

    const KEY: &str = "zd/services/hello/pointer";

    async fn set_up_acl(consul: &Recorded, recording: &str) {
        let replay = consul.replay(&[recording]).await;
        let api = replay.api(Some(Token::ConsulManagement));
        for (token, rules) in policies("host") {
            ensure(&api, token, &rules, &secret(token)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn waits_for_the_acl_system() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["acl-starting"]).await;
            wait(&replay.api(Some(Token::ConsulManagement))).await.unwrap();
        }
    }

    #[tokio::test]
    async fn acl_from_nothing() {
        for consul in versions(CONSUL) {
            set_up_acl(&consul, "acl-first").await;
        }
    }

    #[tokio::test]
    async fn acl_that_is_there_is_only_brought_up_to_date() {
        for consul in versions(CONSUL) {
            set_up_acl(&consul, "acl-again").await;
        }
    }

    #[tokio::test]
    async fn only_a_policy_that_is_not_there_is_missing() {
        let path = "/v1/acl/policy/name/zd-consul-agent";
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["policies"]).await;
            let api = replay.api(Some(Token::ConsulManagement));
            assert_eq!(policy(&api, path).await.unwrap(), Value::Null);
            // Another token may not look, and a Consul that is just starting cannot.
            for (token, said) in [
                (Token::ConsulZd, "403 Forbidden: Permission denied"),
                (Token::ConsulManagement, "500 Internal Server Error: "),
            ] {
                let e = policy(&replay.api(Some(token)), path).await.unwrap_err();
                assert!(e.what.contains(said), "{}", e.what);
            }
        }
    }

    #[tokio::test]
    async fn tokens() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["token-known", "token-unknown"]).await;
            let api = replay.api(Some(Token::ConsulZd));
            assert!(api.tells_token().await.unwrap());
            assert!(!api.with(UNKNOWN).tells_token().await.unwrap());
        }
    }

    #[tokio::test]
    async fn tokens_and_gossip_keys_are_renewed() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["token-known", "token-renew", "tokens-forget", "keyring"]).await;
            let expected: Value = serde_json::from_str(&replay.next_answer()).unwrap();
            let known = accessor(&replay.api(Some(Token::ConsulZd))).await.unwrap();
            assert_eq!(expected["AccessorID"], known);
            let api = replay.api(Some(Token::ConsulManagement));
            renew_management(&api, "00000000-0000-4000-8000-000000000011").await.unwrap();
            // Consul's first token and an old one of zd's go; the present ones, the site's and the anonymous one stay.
            let current = ["a0", "a2"].map(|end| format!("00000000-0000-4000-8000-0000000000{end}"));
            forget_others(&api, &current).await.unwrap();
            use_gossip_key(&api, "MjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjI=").await.unwrap();
        }
    }

    #[tokio::test]
    async fn version_of_one_with_a_leader() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["version"]).await;
            assert_eq!(version_of(&replay.api(Some(Token::ConsulZd))).await.unwrap(), consul.version);
        }
    }

    #[tokio::test]
    async fn no_leader() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["no-leader"]).await;
            let e = version_of(&replay.api(Some(Token::ConsulZd))).await.unwrap_err();
            assert_eq!((e.code, e.what.as_str()), (Code::Stack, "Consul has no leader"));
        }
    }

    #[tokio::test]
    async fn keys_are_read_with_their_index() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["key-missing", "key"]).await;
            let api = replay.api(Some(Token::ConsulZd));
            assert_eq!(read(&api, KEY).await.unwrap(), (Value::Null, 0));
            let answer: Value = serde_json::from_str(&replay.next_answer()).unwrap();
            let blue = json!({ "active": "blue", "release": "1.0.0" });
            let index = answer[0]["ModifyIndex"].as_u64().unwrap();
            assert_eq!(read(&api, KEY).await.unwrap(), (blue, index));
        }
    }

    #[tokio::test]
    async fn a_key_that_may_not_be_read_is_not_a_missing_one() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["key-denied"]).await;
            let e = read(&replay.api(Some(Token::ConsulTemplate)), "other").await.unwrap_err();
            assert_eq!(e.code, Code::Stack);
            let said = "Consul answers /v1/kv/other with 403 Forbidden: Permission denied";
            assert!(e.what.starts_with(said), "{}", e.what);
        }
    }

    #[tokio::test]
    async fn pointer_and_record_are_written_together_or_not_at_all() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["key", "write", "write-stale"]).await;
            let api = replay.api(Some(Token::ConsulZd));
            let (_, index) = read(&api, KEY).await.unwrap();
            let entries = |active: &str, release: &str, seq: u64| {
                let record = json!({ "seq": seq, "service": "hello" });
                [
                    (KEY.to_owned(), json!({ "active": active, "release": release }), index),
                    (format!("zd/audit/hello/{seq:08}"), record, 0),
                ]
            };
            assert!(write(&api, &entries("green", "1.1.0", 4)).await.unwrap());
            assert!(!write(&api, &entries("blue", "1.0.0", 5)).await.unwrap());
        }
    }

    #[tokio::test]
    async fn a_write_that_is_not_permitted_is_no_race() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["write-denied"]).await;
            let blue = json!({ "active": "blue", "release": "1.0.0" });
            let api = replay.api(Some(Token::ConsulZd));
            let e = write(&api, &[("other".into(), blue, 0)]).await.unwrap_err();
            assert!(e.what.starts_with("Consul answers /v1/txn with 409 Conflict: "), "{}", e.what);
            assert!(e.what.contains("Permission denied"), "{}", e.what);
        }
    }

    #[tokio::test]
    async fn a_service_is_forgotten_and_no_other() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["forget"]).await;
            let api = replay.api(Some(Token::ConsulZd));
            forget(&api, &"hello".parse().unwrap()).await.unwrap();
            assert_eq!(read(&api, KEY).await.unwrap(), (Value::Null, 0));
            let (other, _) = read(&api, "zd/services/hello2/pointer").await.unwrap();
            assert_eq!(other, json!({ "active": "blue" }));
            let api = replay.api(Some(Token::ConsulTemplate));
            let e = forget(&api, &"hello2".parse().unwrap()).await.unwrap_err();
            assert!(e.what.contains("403 Forbidden: Permission denied"), "{}", e.what);
        }
    }

    #[tokio::test]
    async fn set_tries_again_after_a_race() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["set-raced"]).await;
            let blue = json!({ "active": "blue", "release": "1.0.0" });
            set(&replay.api(Some(Token::ConsulZd)), KEY, &blue).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_snapshot_is_what_brings_the_tokens_back() {
        for consul in versions(CONSUL) {
            let replay = consul.replay(&["snapshot", "snapshot-restore"]).await;
            let api = replay.api(Some(Token::ConsulManagement));
            let snapshot = api.download(SNAPSHOT).await.unwrap();
            assert_eq!(snapshot, replay.next_bytes());
            assert_eq!(snapshot[..2], [0x1f, 0x8b], "gzip");
            api.upload(SNAPSHOT, &snapshot).await.unwrap();
            assert!(api.with(&secret(Token::ConsulZd)).tells_token().await.unwrap());
        }
    }

    #[tokio::test]
    async fn snapshots_that_cannot_be_had_or_put_back() {
        for consul in versions(CONSUL) {
            let recordings = ["snapshot-no-leader", "snapshot-denied", "snapshot-damaged"];
            let replay = consul.replay(&recordings).await;
            for (token, said) in [
                (Token::ConsulManagement, "500 Internal Server Error: No cluster leader"),
                (Token::ConsulZd, "403 Forbidden: Permission denied"),
            ] {
                let e = replay.api(Some(token)).download(SNAPSHOT).await.unwrap_err();
                assert_eq!(e.code, Code::Stack);
                let said = format!("Consul answers {SNAPSHOT} with {said}");
                assert!(e.what.starts_with(&said), "{}", e.what);
            }
            let api = replay.api(Some(Token::ConsulManagement));
            let e = api.upload(SNAPSHOT, &replay.next_bytes()).await.unwrap_err();
            let said = "500 Internal Server Error: failed to read snapshot file";
            assert!(e.what.contains(said), "{}", e.what);
        }
    }
}
