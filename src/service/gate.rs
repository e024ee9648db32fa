//! The gate: an HTTP server on a unix socket inside `zd switch`. While the pointer is held, nginx asks
//! here about each new request (auth_request, before it reads a body); the answer waits until the
//! release says which slot it goes to (X-Accel-Redirect to `@blue` or `@green`).

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::error::{At, Result};
use crate::host::{fs, paths};
use crate::ids::{Name, Slot};

pub struct Gate {
    shared: Arc<Shared>,
    release: watch::Sender<Option<Slot>>,
    socket: PathBuf,
    server: tokio::task::JoinHandle<()>,
}

struct Shared {
    released: watch::Receiver<Option<Slot>>,
    held_now: AtomicU64,
    /// How long each held request waited.
    waits: Mutex<VecDeque<Duration>>,
}

impl Gate {
    /// Opens the gate's socket; nothing comes to it before the pointer is held.
    pub fn open(service: &Name) -> Result<Self> {
        let socket = paths::run(service).join("gate.sock");
        fs::remove_file(&socket)?;
        let listener = UnixListener::bind(&socket).at(&socket)?;
        allow_nginx(&socket)?;
        let (release, released) = watch::channel(None);
        let shared = Arc::new(Shared { released, held_now: AtomicU64::new(0), waits: Mutex::default() });
        let app = Router::new().fallback(hold).with_state(shared.clone());
        let server = tokio::spawn(async move {
            // Ends with the task; an error of accept() is nginx's 502 and thereby the active slot.
            let _ = axum::serve(listener, app).await;
        });
        Ok(Self { shared, release, socket, server })
    }

    /// Requests waiting here now.
    pub fn held_now(&self) -> u64 {
        self.shared.held_now.load(Ordering::SeqCst)
    }

    /// Lets all go to `slot`, also those still on their way here.
    pub fn release(&self, slot: Slot) {
        self.release.send_replace(Some(slot));
    }

    /// How long each held request waited, so far.
    pub fn waits(&self) -> Vec<Duration> {
        let waits = self.shared.waits.lock().unwrap_or_else(|e| e.into_inner());
        waits.iter().copied().collect()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.server.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn hold(State(shared): State<Arc<Shared>>) -> (StatusCode, [(HeaderName, HeaderValue); 1]) {
    let start = Instant::now();
    shared.held_now.fetch_add(1, Ordering::SeqCst);
    let mut released = shared.released.clone();
    let slot = match released.wait_for(Option::is_some).await {
        Ok(slot) => *slot,
        Err(_) => None,
    };
    shared.held_now.fetch_sub(1, Ordering::SeqCst);
    shared.waits.lock().unwrap_or_else(|e| e.into_inner()).push_back(start.elapsed());
    let (status, to) = match slot {
        Some(Slot::Blue) => (StatusCode::OK, "@blue"),
        Some(Slot::Green) => (StatusCode::OK, "@green"),
        // The gate goes away without a word: nginx looks at the pointer itself.
        None => (StatusCode::SERVICE_UNAVAILABLE, ""),
    };
    (status, [(HeaderName::from_static("x-accel-redirect"), HeaderValue::from_static(to))])
}

fn allow_nginx(socket: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let (_, gid) = fs::ids(Some(paths::NGINX_USER))?;
    std::os::unix::fs::chown(socket, Some(0), Some(gid)).at(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660)).at(socket)
}
