//! The options made ready for use, and opening connections as they say.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, HOST, HeaderName, HeaderValue};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::failure::Failure;
use super::{Mode, Options};

pub type Sender = SendRequest<Full<Bytes>>;

/// The options, made ready for use.
pub struct Plan {
    target: SocketAddr,
    pub timeout: Duration,
    pub connections: usize,
    pub version_header: HeaderName,
    pub body_bytes: usize,
    /// For keep-alive and for fresh connections; cloned for each request.
    pub get: [Request<Full<Bytes>>; 2],
    pub post: [Request<Full<Bytes>>; 2],
}

impl Plan {
    pub fn new(o: &Options) -> Result<Plan, String> {
        if o.rate == 0 || o.requests() == 0 {
            return Err(format!("{} requests/s for {:?} makes no request", o.rate, o.duration));
        }
        if o.connections == 0 || o.timeout.is_zero() {
            return Err("no request fits into 0 connections or a timeout of 0".to_owned());
        }
        let uri: Uri = o.path.parse().map_err(|e| format!("path {:?}: {e}", o.path))?;
        let host = HeaderValue::from_str(&o.host).map_err(|e| format!("host {:?}: {e}", o.host))?;
        let request = |method: hyper::Method, bytes: usize, fresh: bool| {
            let mut request = Request::new(Full::new(Bytes::from(vec![b'z'; bytes])));
            *request.method_mut() = method;
            *request.uri_mut() = uri.clone();
            request.headers_mut().insert(HOST, host.clone());
            if fresh {
                request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            request
        };
        Ok(Plan {
            target: o.target,
            timeout: o.timeout,
            connections: o.connections,
            version_header: HeaderName::from_bytes(o.version_header.as_bytes())
                .map_err(|e| format!("header {:?}: {e}", o.version_header))?,
            body_bytes: o.body_bytes,
            get: [false, true].map(|fresh| request(hyper::Method::GET, 0, fresh)),
            post: [false, true].map(|fresh| request(hyper::Method::POST, o.body_bytes, fresh)),
        })
    }

    /// Opens some connections beforehand and lets requests take them in turn, so that even a fast
    /// server, which would need only one or two, is asked over several (and by several of its workers).
    pub async fn warm_up(&self, o: &Options) -> VecDeque<Sender> {
        let mut idle = VecDeque::new();
        if o.mode != Mode::Fresh {
            let wanted = (o.rate / 100).clamp(8, 128) as usize;
            while idle.len() < wanted.min(self.connections) {
                // A server that is not there yet is the first request's failure, not ours.
                let Ok(Ok(sender)) = timeout(self.timeout, self.connect(false)).await else { break };
                idle.push_back(sender);
            }
        }
        idle
    }

    pub async fn connect(&self, fresh: bool) -> Result<Sender, Failure> {
        let stream = TcpStream::connect(self.target).await.map_err(Failure::connect)?;
        stream.set_nodelay(true).map_err(Failure::connect)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(Failure::of)?;
        spawn_local(async move {
            if !fresh {
                // Its errors reach the request that they concern.
                let _ = connection.await;
            } else if let Ok(parts) = connection.without_shutdown().await {
                // The server closes first: otherwise each connection would keep one of this machine's
                // 28,000 ports busy for a minute.
                let mut stream = parts.io.into_inner();
                let _ = timeout(Duration::from_secs(1), stream.read(&mut [0; 16])).await;
            }
        });
        Ok(sender)
    }
}
