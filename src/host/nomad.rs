//! Nomad: ACL, node, jobs, and why an allocation fails. HTTP API v1 on loopback.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::api::Api;
use super::secrets::{self, Token};
use super::{exec, fs, paths, stores, systemd, until};
use crate::error::{Code, OrCode, Result};
use crate::ids::{Name, Slot};
use crate::plan::Standing;

pub const UNIT: &str = "nomad.service";
const SNAPSHOT: &str = "/v1/operator/snapshot";
const READY: Duration = Duration::from_secs(90);
const EVERY: Duration = Duration::from_millis(200);
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
    until(READY, EVERY, async || knows_token().await?.then_some(()).ok_or_else(unknown)).await?;
    renew_root_key(&connect()?).await
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

/// The job as it is registered; None where there is none, or one that was stopped.
pub async fn job(api: &Api, id: &str) -> Result<Option<Value>> {
    let job = api.get(&format!("/v1/job/{id}")).await?;
    Ok((!job.is_null() && job["Stop"] != true).then_some(job))
}

/// Fields of a job that only the server sets and changes by itself (Nomad HTTP API, "Read Job").
const SERVERS_OWN: [&str; 7] =
    ["CreateIndex", "JobModifyIndex", "ModifyIndex", "Stable", "Status", "StatusDescription", "SubmitTime"];

/// Registers a job and returns its record: the job as submitted, with the version number that it got. Any later
/// registration that changes something, by whomever, gets another number.
pub async fn register(api: &Api, id: &str, job: &Value) -> Result<Value> {
    let mut record = job.clone();
    if let Some(fields) = record.as_object_mut() {
        fields.retain(|key, _| !SERVERS_OWN.contains(&key.as_str()));
    }
    api.put("/v1/jobs", &json!({ "Job": record })).await?;
    let found = api.get(&format!("/v1/job/{id}")).await?;
    record[VERSION] = found[VERSION].clone();
    Ok(record)
}

const VERSION: &str = "Version";

/// The record of the job that zd registered last for a slot; None where an earlier zd has kept none.
pub fn record(service: &Name, slot: Slot) -> Result<Option<Value>> {
    let path = paths::placed_job(service, slot);
    let Some(bytes) = fs::read_if_any(&path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).or_code(Code::Io, path.display())
}

/// Whether a job has every field of `wanted`. What it has beyond these are defaults of the server, which differ from
/// version to version and say nothing about who changed what.
pub fn covers(found: &Value, wanted: &Value) -> bool {
    let is_empty = |value: &Value| {
        value.is_null()
            || value.as_object().is_some_and(serde_json::Map::is_empty)
            || value.as_array().is_some_and(Vec::is_empty)
    };
    match (found, wanted) {
        (_, wanted) if is_empty(wanted) => is_empty(found),
        (Value::Object(found), Value::Object(wanted)) => {
            wanted.iter().all(|(key, wanted)| covers(found.get(key).unwrap_or(&Value::Null), wanted))
        }
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len()
                && found.iter().zip(wanted).all(|(found, wanted)| covers(found, wanted))
        }
        // Nomad gives the whole numbers of a driver's configuration back as 1048576.0.
        (Value::Number(found), Value::Number(wanted)) => found.as_f64() == wanted.as_f64(),
        (found, wanted) => found == wanted,
    }
}

/// Whether a job record and a job that is to be submitted say the same.
pub fn is_record_of(record: &Value, job: &Value) -> bool {
    let submitted = |job: &Value| {
        let mut job = job.clone();
        job.as_object_mut().map(|fields| fields.remove(VERSION));
        job
    };
    submitted(record) == submitted(job)
}

/// Stops a job for good; its containers go.
pub async fn purge(api: &Api, id: &str) -> Result<()> {
    if api.get(&format!("/v1/job/{id}")).await?.is_null() {
        return Ok(());
    }
    api.delete(&format!("/v1/job/{id}?purge=true")).await.map(drop)
}

/// Allocations that are done let go of their folders and mounts.
pub async fn collect_garbage(api: &Api) -> Result<()> {
    api.put("/v1/system/gc", &json!({})).await.map(drop)
}

/// A task that failed this often will not become healthy by waiting.
const RESTARTS: u64 = 3;

/// The job's allocations, also those that have ended.
async fn all_allocations(api: &Api, id: &str) -> Result<Vec<Value>> {
    let all = api.get(&format!("/v1/job/{id}/allocations")).await?;
    Ok(all.as_array().cloned().unwrap_or_default())
}

/// The job's live allocations.
async fn allocations(api: &Api, id: &str) -> Result<Vec<Value>> {
    let all = all_allocations(api, id).await?;
    Ok(all.into_iter().filter(|a| a["DesiredStatus"] == "run").collect())
}

/// Ids of the job's live allocations.
pub async fn allocation_ids(api: &Api, id: &str) -> Result<BTreeSet<String>> {
    let live = allocations(api, id).await?;
    Ok(live.iter().filter_map(|a| a["ID"].as_str().map(str::to_owned)).collect())
}

/// Every allocation of the job has ended: containers of it that are still there are not Nomad's.
pub async fn has_ended(api: &Api, id: &str) -> Result<bool> {
    let ended = |a: &Value| ["complete", "failed"].iter().any(|status| a["ClientStatus"] == *status);
    Ok(all_allocations(api, id).await?.iter().all(ended))
}

/// Waits until Nomad says of each of these containers that it runs it. Its docker driver names them after their
/// allocations.
pub async fn still_runs(containers: &[Standing]) -> Result<()> {
    let api = connect()?;
    systemd::until_serving(UNIT, READY, EVERY, async || {
        let all = api.get("/v1/allocations").await?;
        let runs = |a: &&Value| a["DesiredStatus"] == "run" && a["ClientStatus"] == "running";
        let running = all.as_array().into_iter().flatten().filter(runs);
        let running: Vec<&str> = running.filter_map(|a| a["ID"].as_str()).collect();
        match containers.iter().find(|container| !running.iter().any(|id| container.name.ends_with(id))) {
            None => Ok(()),
            Some(Standing { name, .. }) => Err(Code::Stack
                .err(format!("Nomad does not run the allocation of container {name} any more"))
                .cure("zd logs nomad")),
        }
    })
    .await
}

fn tasks(allocation: &Value) -> impl Iterator<Item = (&String, &Value)> {
    allocation["TaskStates"].as_object().into_iter().flatten()
}

/// Some task keeps ending.
pub async fn keeps_ending(api: &Api, id: &str) -> bool {
    let Ok(allocations) = allocations(api, id).await else { return false };
    let restarts = allocations.iter().flat_map(tasks).filter_map(|(_, task)| task["Restarts"].as_u64());
    restarts.max() >= Some(RESTARTS)
}

/// Why a job does not run as it should, for people.
#[derive(Debug, Default, PartialEq)]
pub struct Reason {
    pub lines: Vec<String>,
    /// Where it is known what to do.
    pub cure: Option<&'static str>,
}

/// What keeps Nomad from placing the job, and what its allocations went through and last wrote.
pub async fn explain(api: &Api, id: &str) -> Result<Reason> {
    let mut reason = unplaced(api, id).await?;
    for allocation in allocations(api, id).await? {
        for (task, state) in tasks(&allocation) {
            let events = state["Events"].as_array().into_iter().flatten();
            let events: Vec<&str> = events.filter_map(|e| e["DisplayMessage"].as_str()).collect();
            let last = &events[events.len().saturating_sub(3)..];
            let name = allocation["Name"].as_str().unwrap_or("?");
            reason.lines.push(format!("{name}: {}", last.join("; ")));
            let alloc = allocation["ID"].as_str().unwrap_or_default();
            for kind in ["stdout", "stderr"] {
                let path = format!(
                    "/v1/client/fs/logs/{alloc}?task={task}&type={kind}&plain=true&origin=end&offset=2000"
                );
                if let Ok(reply) = api.send(Method::GET, &path, None::<&()>).await
                    && reply.status.is_success()
                    && !reply.body.trim().is_empty()
                {
                    reason.lines.push(format!("its last lines: {}", exec::last_lines(&reply.body, 5)));
                }
            }
        }
    }
    Ok(reason)
}

/// What keeps the scheduler from placing groups of a job; empty where all are placed. An evaluation that could
/// not place all ends, and leaves a blocked one that waits for room.
async fn unplaced(api: &Api, id: &str) -> Result<Reason> {
    let evaluations = api.get(&format!("/v1/job/{id}/evaluations")).await?;
    let blocked = evaluations.as_array().into_iter().flatten().find(|e| e["Status"] == "blocked");
    let groups = blocked.and_then(|e| e["FailedTGAllocs"].as_object());
    let mut reason = Reason::default();
    for (group, metric) in groups.into_iter().flatten() {
        let (why, cure) = obstacle(metric);
        reason.lines.push(format!("Nomad cannot place group {group} of {id}: {why}"));
        reason.cure = Some(cure);
    }
    reason.lines.sort();
    Ok(reason)
}

/// What of a node was not enough, or not as the job wants it (AllocationMetric of Nomad's API); and the cure.
fn obstacle(metric: &Value) -> (String, &'static str) {
    let first = |key: &str| metric[key].as_object().and_then(|found| found.iter().next());
    let on = |nodes: &Value| match nodes.as_u64() {
        Some(1) => "on 1 node".to_owned(),
        nodes => format!("on {} nodes", nodes.unwrap_or(0)),
    };
    if let Some((what, nodes)) = first("DimensionExhausted") {
        let cure = match what.as_str() {
            "memory" => {
                "zd scale to fewer containers, a smaller memory-mb in the manifest (Nomad counts 256 where there is \
                 none), or more memory for this host"
            }
            "cpu" => "zd scale to fewer containers, or more processors for this host",
            "disk" => "make room where /var/lib/zd/nomad is: df -h",
            _ => "zd logs nomad",
        };
        return (format!("{what} exhausted {}", on(nodes)), cure);
    }
    if let Some((what, nodes)) = first("ConstraintFiltered") {
        let cure = match what.as_str() {
            "missing drivers" => {
                "systemctl restart docker, then zd status: Nomad's docker driver has to be healthy"
            }
            _ => "zd logs nomad",
        };
        return (format!("{what} {}", on(nodes)), cure);
    }
    let cure =
        "zd status says what Nomad's node is; one that was drained: nomad node eligibility -enable -self";
    ("no node is ready and eligible".into(), cure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::api::NOMAD;
    use crate::host::replay::{Recorded, Replay, UNKNOWN, versions};

    async fn replay(nomad: &Recorded, recordings: &[&str]) -> (Replay, Api) {
        let replay = nomad.replay(recordings).await;
        let api = replay.api(Some(Token::NomadManagement));
        (replay, api)
    }

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
            let (_replay, api) = replay(&nomad, &["ready"]).await;
            assert_eq!(version_of(&api).await.unwrap(), nomad.version);
        }
    }

    #[tokio::test]
    async fn nodes_that_do_not() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = replay(&nomad, &["starting", "docker-unhealthy"]).await;
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
            let (_replay, api) = replay(&nomad, &["no-leader", "token-unknown"]).await;
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
        assert!(!keeps_ending(&api, "hello-green").await);
        let e = explain(&api, "hello-green").await.unwrap_err();
        assert!(e.what.starts_with("Nomad does not answer: "), "{}", e.what);
    }

    #[tokio::test]
    async fn jobs_that_run_and_that_do_not() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = replay(&nomad, &["job", "job-missing", "job-stopped"]).await;
            let found = job(&api, "hello-blue").await.unwrap().unwrap();
            assert_eq!(found["Meta"]["zd_version"], "1.0.0");
            assert_eq!(job(&api, "hello-blue").await.unwrap(), None);
            assert_eq!(job(&api, "hello-blue").await.unwrap(), None);
        }
    }

    #[test]
    fn what_a_server_adds_is_no_change() {
        let submitted = json!({
            "ID": "hello-blue",
            "Env": null,
            "Version": 0,
            "TaskGroups": [{ "Name": "1", "Count": 1, "Tasks": [{ "Config": { "image": "a", "memory": 64 } }] }],
        });
        let found = json!({
            "ID": "hello-blue",
            "Env": {},
            "Version": 0,
            "Constraints": [{ "LTarget": "${attr.consul.version}" }],
            "TaskGroups": [{ "Name": "1", "Count": 1, "Consul": { "Cluster": "default" },
                             "Tasks": [{ "Config": { "image": "a", "memory": 64.0 }, "User": "" }] }],
        });
        assert!(covers(&found, &submitted));
        type Change = fn(&mut Value);
        let changes: [Change; 5] = [
            |job| job["TaskGroups"][0]["Count"] = json!(2),
            |job| job["TaskGroups"][0]["Tasks"][0]["Config"]["image"] = json!("b"),
            |job| job["TaskGroups"] = json!([]),
            |job| job["Env"] = json!({ "A": "1" }),
            // What is not among the submitted fields shows in the version.
            |job| job["Version"] = json!(1),
        ];
        for change in changes {
            let mut changed = found.clone();
            change(&mut changed);
            assert!(!covers(&changed, &submitted), "{changed}");
        }
    }

    #[test]
    fn a_record_is_compared_without_its_version() {
        let record = json!({ "ID": "hello-blue", "Version": 3 });
        assert!(is_record_of(&record, &json!({ "ID": "hello-blue" })));
        assert!(!is_record_of(&record, &json!({ "ID": "hello-blue", "Env": { "A": "1" } })));
    }

    #[tokio::test]
    async fn tokens_and_gossip_keys_are_renewed() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = replay(&nomad, &["token-renew", "tokens-forget", "keyring"]).await;
            assert_eq!(another_token(&api).await.unwrap(), "00000000-0000-4000-8000-000000000012");
            // Nomad's first token goes, the site's stays.
            forget_others(&api).await.unwrap();
            use_gossip_key(&api, "MjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjI=").await.unwrap();
        }
    }

    #[tokio::test]
    async fn register_purge_and_collect() {
        for nomad in versions(NOMAD) {
            let recordings = ["register", "job", "purge", "job-missing", "gc"];
            let (replay, api) = replay(&nomad, &recordings).await;
            let submitted = replay.next_body()["Job"].clone();
            let record = register(&api, "hello-blue", &submitted).await.unwrap();
            assert_eq!(record["Version"], 0);
            assert!(is_record_of(&record, &submitted));
            // Whatever the version adds, by itself it changes nothing.
            let found = job(&api, "hello-blue").await.unwrap().unwrap();
            assert!(covers(&found, &record), "{found}");
            purge(&api, "hello-green").await.unwrap();
            purge(&api, "hello-blue").await.unwrap();
            collect_garbage(&api).await.unwrap();
        }
    }

    #[tokio::test]
    async fn only_live_tasks_that_were_restarted_often_keep_ending() {
        for nomad in versions(NOMAD) {
            for (recording, expected) in [
                ("allocations-young", false),
                ("allocations-dying", true),
                // It ended as often, and is to be stopped by now.
                ("allocations-purged", false),
            ] {
                let (_replay, api) = replay(&nomad, &[recording]).await;
                assert_eq!(keeps_ending(&api, "hello-green").await, expected, "{recording}");
            }
            for (recording, expected) in [("allocations-dying", false), ("allocations-purged", true)] {
                let (_replay, api) = replay(&nomad, &[recording]).await;
                assert_eq!(has_ended(&api, "hello-green").await.unwrap(), expected, "{recording}");
            }
        }
    }

    #[tokio::test]
    async fn events_and_last_lines_explain() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = replay(&nomad, &["evaluations-placed", "allocations-dying", "logs"]).await;
            let reason = explain(&api, "hello-green").await.unwrap();
            assert_eq!(reason.cure, None);
            let [events, out, errors] = &reason.lines[..] else { panic!("{reason:?}") };
            let said = "hello-green.1[0]: Task started by client; Exit Code: 1; Task restarting in 1.";
            assert!(events.starts_with(said), "{events}");
            assert_eq!(out, "its last lines: starting | starting | starting | starting");
            assert_eq!(errors, "its last lines: no database | no database | no database | no database");
        }
    }

    #[tokio::test]
    async fn what_keeps_a_job_from_being_placed() {
        for nomad in versions(NOMAD) {
            for (recording, groups, why, cure) in [
                // There is room for one of the two, by chance this or that.
                ("memory", 1, "memory exhausted on 1 node", "memory-mb"),
                ("driver", 2, "missing drivers on 1 node", "docker"),
                // Evaluations of the jobs before, which were purged, are in the same answer.
                ("ineligible", 2, "no node is ready and eligible", "eligibility"),
            ] {
                let (_replay, api) = replay(&nomad, &[&format!("evaluations-{recording}")]).await;
                let reason = unplaced(&api, "hello-green").await.unwrap();
                let both =
                    [1, 2].map(|group| format!("Nomad cannot place group {group} of hello-green: {why}"));
                assert_eq!(reason.lines.len(), groups, "{reason:?}");
                assert!(reason.lines.iter().all(|line| both.contains(line)), "{reason:?}");
                assert!(reason.cure.unwrap().contains(cure), "{reason:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_snapshot_is_what_brings_the_token_back() {
        for nomad in versions(NOMAD) {
            let (replay, api) = replay(&nomad, &["snapshot", "bootstrap", "snapshot-restore"]).await;
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
            let (replay, api) = replay(&nomad, &recordings).await;
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
