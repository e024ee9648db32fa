//! JSON over HTTP with the two APIs of the full stack, Nomad's and Consul's, both on loopback.

use std::time::Duration;

use reqwest::{Certificate, Client, ClientBuilder, Identity, Method, RequestBuilder, StatusCode};
use serde::Serialize;
use serde_json::Value;

use super::paths;
use crate::bundle::sources::url::chain;
use crate::error::{At, Code, Error, OrCode, Result};

const LIMIT: Duration = Duration::from_secs(20);

pub const CONSUL: Server =
    Server { name: "Consul", unit: "consul", base: "http://127.0.0.1:8500", header: "x-consul-token" };
pub const NOMAD: Server =
    Server { name: "Nomad", unit: "nomad", base: "https://127.0.0.1:4646", header: "x-nomad-token" };

/// Where one of the two is, and how it is spoken to.
#[derive(Clone, Copy)]
pub struct Server {
    /// For people.
    name: &'static str,
    pub(super) unit: &'static str,
    base: &'static str,
    /// Header that carries the token.
    header: &'static str,
}

pub struct Api {
    client: Client,
    server: Server,
    token: Option<String>,
}

/// What an API answered; a status that is no success is not yet an error.
pub struct Reply {
    pub status: StatusCode,
    pub body: String,
}

impl Api {
    pub fn consul(token: Option<String>) -> Result<Self> {
        Self::new(builder().tls_certs_only([]), CONSUL, token)
    }

    /// Nomad's, with both sides showing a certificate of the private CA.
    pub fn nomad(token: Option<String>) -> Result<Self> {
        let ca = std::fs::read(paths::CA).at(paths::CA)?;
        let ca = Certificate::from_pem(&ca).or_code(Code::Io, paths::CA)?;
        let mut pem = std::fs::read(paths::NOMAD_CERT).at(paths::NOMAD_CERT)?;
        pem.extend(std::fs::read(paths::NOMAD_KEY).at(paths::NOMAD_KEY)?);
        let identity = Identity::from_pem(&pem).or_code(Code::Io, paths::NOMAD_CERT)?;
        Self::new(builder().tls_certs_only([ca]).identity(identity), NOMAD, token)
    }

    /// The same server at another address, without TLS: a replay of what it once answered.
    #[cfg(test)]
    pub fn replayed(server: Server, base: &'static str, token: Option<String>) -> Result<Self> {
        Self::new(builder().tls_certs_only([]), Server { base, ..server }, token)
    }

    fn new(client: ClientBuilder, server: Server, token: Option<String>) -> Result<Self> {
        let client = client.build().or_code(Code::Bug, format!("making a client for {}", server.name))?;
        Ok(Self { client, server, token })
    }

    /// The same API, with another token.
    pub fn with(&self, token: &str) -> Self {
        Self { client: self.client.clone(), server: self.server, token: Some(token.to_owned()) }
    }

    /// Whether the server knows of a leader: both tell at the same path.
    pub async fn has_leader(&self) -> Result<bool> {
        const PATH: &str = "/v1/status/leader";
        let reply = self.send(Method::GET, PATH, None::<&()>).await?;
        if reply.body.contains("No cluster leader") {
            return Ok(false);
        }
        Ok(self.success(PATH, reply)?.as_str().is_some_and(|leader| !leader.is_empty()))
    }

    /// Whether the token that it is asked with is one: Consul and Nomad tell at the same path. Without a leader, or
    /// before their ACL has begun, they do not tell.
    pub async fn tells_token(&self) -> Result<bool> {
        const PATH: &str = "/v1/acl/token/self";
        let reply = self.send(Method::GET, PATH, None::<&()>).await?;
        match reply.status {
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => Ok(false),
            _ => Ok(!self.success(PATH, reply)?.is_null()),
        }
    }

    pub async fn knows_token(&self) -> bool {
        self.tells_token().await.unwrap_or(false)
    }

    pub async fn send(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Reply> {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(|e| self.silent(&e))?;
        let status = answer.status();
        let body = answer.text().await.map_err(|e| self.silent(&e))?;
        Ok(Reply { status, body })
    }

    /// The answer's bytes; any status but success is an error.
    pub async fn download(&self, path: &str) -> Result<Vec<u8>> {
        let answer = self.request(Method::GET, path).send().await.map_err(|e| self.silent(&e))?;
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(|e| self.silent(&e))?;
        match status.is_success() {
            true => Ok(bytes.into()),
            false => Err(self.refused(path, &Reply { status, body: String::from_utf8_lossy(&bytes).into() })),
        }
    }

    /// Puts plain bytes.
    pub async fn upload(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let request = self.request(Method::PUT, path).body(bytes.to_vec());
        let answer = request.send().await.map_err(|e| self.silent(&e))?;
        let status = answer.status();
        let body = answer.text().await.map_err(|e| self.silent(&e))?;
        self.success(path, Reply { status, body }).map(drop)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.server.base));
        match &self.token {
            Some(token) => request.header(self.server.header, token),
            None => request,
        }
    }

    /// The answer's JSON; any status but success is an error. `null` where the thing is not there (404).
    pub async fn get(&self, path: &str) -> Result<Value> {
        let reply = self.send(Method::GET, path, None::<&()>).await?;
        if reply.status == StatusCode::NOT_FOUND {
            return Ok(Value::Null);
        }
        self.success(path, reply)
    }

    pub async fn put(&self, path: &str, body: &impl Serialize) -> Result<Value> {
        self.call(Method::PUT, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> Result<Value> {
        self.call(Method::DELETE, path, None::<&()>).await
    }

    /// The answer's JSON; any status but success is an error.
    pub async fn call(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Value> {
        let reply = self.send(method, path, body).await?;
        self.success(path, reply)
    }

    /// As [`Api::call`], of an answer that is here already.
    pub fn success(&self, path: &str, reply: Reply) -> Result<Value> {
        if reply.status.is_success() {
            return Ok(serde_json::from_str(&reply.body).unwrap_or(Value::Null));
        }
        Err(self.refused(path, &reply))
    }

    pub fn refused(&self, path: &str, reply: &Reply) -> Error {
        let path = path.split('?').next().unwrap_or(path);
        Code::Stack
            .err(format!("{} answers {path} with {}: {}", self.server.name, reply.status, reply.body.trim()))
            .cure(format!(
                "see `systemctl status {0}` and `zd logs {0}`, then run it again",
                self.server.unit
            ))
    }

    fn silent(&self, e: &reqwest::Error) -> Error {
        Code::Stack.err(format!("{} does not answer: {}", self.server.name, chain(e))).cure(format!(
            "systemctl start {0}, then zd logs {0}; what serves goes on serving",
            self.server.unit
        ))
    }
}

fn builder() -> ClientBuilder {
    Client::builder().no_proxy().timeout(LIMIT).connect_timeout(Duration::from_secs(2))
}
