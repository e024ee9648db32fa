//! Jobs of Nomad: what was submitted, what is registered, and why one does not run. HTTP API v1 on loopback.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};

use super::api::Api;
use super::nomad::{EVERY, READY, UNIT, connect};
use super::{exec, fs, paths, systemd};
use crate::error::{Code, OrCode, Result};
use crate::ids::{Name, Slot};
use crate::plan::Standing;

/// The job as it is registered; None where there is none, or one that was stopped.
pub async fn job(api: &Api, id: &str) -> Result<Option<Value>> {
    let job = api.get(&format!("/v1/job/{id}")).await?;
    Ok((!job.is_null() && job["Stop"] != true).then_some(job))
}

/// Fields of a job that only the server sets and changes by itself (Nomad HTTP API, "Read Job").
const SERVERS_OWN: [&str; 7] =
    ["CreateIndex", "JobModifyIndex", "ModifyIndex", "Stable", "Status", "StatusDescription", "SubmitTime"];

/// Registers a job and returns its record: the job as submitted, with the version number that it got. Any later
/// registration that changes the job gets another number.
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
    let blocked = evaluations.as_array().into_iter().flatten().filter(|e| e["Status"] == "blocked");
    // That of a job before, which was purged, may still be there.
    let blocked = blocked.max_by_key(|e| e["CreateIndex"].as_u64());
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
    use crate::host::replay::versions;
    use crate::host::secrets::Token;

    #[tokio::test]
    async fn jobs_that_run_and_that_do_not() {
        for nomad in versions(NOMAD) {
            let (_replay, api) =
                nomad.asked(&["job", "job-missing", "job-stopped"], Token::NomadManagement).await;
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
    async fn register_purge_and_collect() {
        for nomad in versions(NOMAD) {
            let recordings = ["register", "job", "purge", "job-missing", "gc"];
            let (replay, api) = nomad.asked(&recordings, Token::NomadManagement).await;
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
                let (_replay, api) = nomad.asked(&[recording], Token::NomadManagement).await;
                assert_eq!(keeps_ending(&api, "hello-green").await, expected, "{recording}");
            }
            for (recording, expected) in [("allocations-dying", false), ("allocations-purged", true)] {
                let (_replay, api) = nomad.asked(&[recording], Token::NomadManagement).await;
                assert_eq!(has_ended(&api, "hello-green").await.unwrap(), expected, "{recording}");
            }
        }
    }

    #[tokio::test]
    async fn events_and_last_lines_explain() {
        for nomad in versions(NOMAD) {
            let (_replay, api) = nomad
                .asked(&["evaluations-placed", "allocations-dying", "logs"], Token::NomadManagement)
                .await;
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
                let (_replay, api) =
                    nomad.asked(&[&format!("evaluations-{recording}")], Token::NomadManagement).await;
                let reason = unplaced(&api, "hello-green").await.unwrap();
                let both =
                    [1, 2].map(|group| format!("Nomad cannot place group {group} of hello-green: {why}"));
                assert_eq!(reason.lines.len(), groups, "{reason:?}");
                assert!(reason.lines.iter().all(|line| both.contains(line)), "{reason:?}");
                assert!(reason.cure.unwrap().contains(cure), "{reason:?}");
            }
        }
    }
}
