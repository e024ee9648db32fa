//! One plain HTTP/1.1 GET over TCP or a unix socket, never retried: for probes of our own parts.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};

/// Probes answer small; more than this is cut off as an error.
const MOST: usize = 64 << 10;

pub struct Answer {
    pub status: u16,
    pub headers: hyper::HeaderMap,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// An open connection; several requests may follow one another on it.
pub struct Connection(SendRequest<Empty<Bytes>>);

impl Connection {
    pub async fn unix(path: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(path).await.map_err(|e| e.to_string())?;
        Self::over(TokioIo::new(stream)).await
    }

    pub async fn tcp(addr: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(addr).await.map_err(|e| e.to_string())?;
        Self::over(TokioIo::new(stream)).await
    }

    async fn over<T>(io: T) -> Result<Self, String>
    where
        T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let (send, connection) =
            hyper::client::conn::http1::handshake(io).await.map_err(|e| e.to_string())?;
        tokio::spawn(connection);
        Ok(Self(send))
    }

    pub async fn get(&mut self, host: &str, path: &str) -> Result<Answer, String> {
        let request = Request::get(path)
            .header(header::HOST, host)
            .header(header::USER_AGENT, "zd")
            .body(Empty::new())
            .map_err(|e| e.to_string())?;
        self.0.ready().await.map_err(|e| e.to_string())?;
        let answer = self.0.send_request(request).await.map_err(|e| e.to_string())?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, MOST).collect().await.map_err(|e| e.to_string())?.to_bytes();
        let body = String::from_utf8_lossy(&body).into_owned();
        Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body })
    }
}

/// One request on a fresh connection, bounded in time. The error says why there was no answer.
pub async fn get(addr: SocketAddr, host: &str, path: &str, limit: Duration) -> Result<Answer, String> {
    let probe = async { Connection::tcp(addr).await?.get(host, path).await };
    tokio::time::timeout(limit, probe).await.unwrap_or_else(|_| Err(format!("no answer in {limit:?}")))
}
