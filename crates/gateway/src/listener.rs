//! Accepting connections, and the moment a request began.
//!
//! A request begins when its first byte is read from the socket, before TLS and
//! HTTP are; if it was there when the connection was accepted, then at that
//! moment. So the time a request spends in being read, and waiting for a busy
//! runtime, is in the figures. What it waited in the kernel before that is not
//! known here.
//!
//! hyper serves the connections, as it does in `axum::serve`, which has no place
//! for a clock between socket and HTTP, nor for TLS.
//!
//! What may not happen here: a connection that holds up others, by its handshake
//! or by a head that never ends.

use crate::tls::Tls;
use axum::{Router, body::Body, extract::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    io::{self, IoSlice},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tower_service::Service as _;

/// Time for a request's head, and for a connection between two requests. Longer
/// than load balancers keep theirs (60 s), so that it is them who close.
const HEAD: Duration = Duration::from_secs(75);
/// Time to agree on TLS.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Pause when the process has no file left for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// When the request on a connection began.
#[derive(Debug)]
struct Arrival {
    accepted: Instant,
    /// Nanoseconds after `accepted`.
    after: AtomicU64,
}

impl Arrival {
    fn set(&self, at: Instant) {
        let after = at.saturating_duration_since(self.accepted).as_nanos();
        self.after.store(u64::try_from(after).unwrap_or(u64::MAX), Relaxed);
    }

    fn get(&self) -> Instant {
        self.accepted + Duration::from_nanos(self.after.load(Relaxed))
    }
}

/// The moment a request began, among its extensions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrived(pub(crate) Instant);

impl Arrived {
    /// When `request` began; now, if no listener of ours took it.
    pub(crate) fn of(request: &Request) -> Instant {
        request.extensions().get::<Self>().map_or_else(Instant::now, |a| a.0)
    }
}

/// A socket that notes when requests begin: at the first bytes, and at those
/// that follow bytes of ours.
struct Timed<S> {
    socket: S,
    arrival: Arc<Arrival>,
    /// The next bytes begin a request.
    fresh: bool,
    /// Nothing was waited for yet: bytes that come were there at acceptance.
    untouched: bool,
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.socket).poll_read(cx, buf);
        if self.fresh && buf.filled().len() > before {
            if !self.untouched {
                self.arrival.set(Instant::now());
            }
            self.fresh = false;
        }
        self.untouched = false;
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.fresh = true;
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.fresh = true;
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// What became of connections.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    pub(crate) open: AtomicU64,
    pub(crate) accepted: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
}

/// Counts a connection for as long as it is held.
struct Open(Arc<Connections>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// Serves `router` on `listener` until `stop` is ready; then refuses new
/// connections, and returns when those that are open have answered what they
/// were asked.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    tls: Arc<Tls>,
    counts: Arc<Connections>,
    stop: impl Future<Output = ()>,
) {
    let (closing, told) = watch::channel(());
    let mut stop = pin!(stop);
    loop {
        let socket = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => socket,
                Err(e) if matches!(
                    e.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
                ) => continue,
                Err(_) => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
            () = &mut stop => break,
        };
        counts.accepted.fetch_add(1, Relaxed);
        counts.open.fetch_add(1, Relaxed);
        let open = Open(counts.clone());
        tokio::spawn(connection(socket, Instant::now(), router.clone(), tls.clone(), open, told.clone()));
    }
    // Each connection holds a receiver for as long as it lives.
    drop((listener, told));
    let _ = closing.send(());
    closing.closed().await;
}

async fn connection(socket: TcpStream, accepted: Instant, router: Router, tls: Arc<Tls>, open: Open, told: watch::Receiver<()>) {
    // A stream's pieces are small: waiting for an acknowledgement before the next
    // one costs 40 ms each. A socket that is gone fails at its first use.
    let _ = socket.set_nodelay(true);
    let arrival = Arc::new(Arrival { accepted, after: AtomicU64::new(0) });
    let socket = Timed { socket, arrival: arrival.clone(), fresh: true, untouched: true };
    let Some(acceptor) = tls.acceptor() else {
        return converse(socket, arrival, router, told).await;
    };
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(socket)).await {
        Ok(Ok(socket)) => converse(socket, arrival, router, told).await,
        Ok(Err(_)) | Err(_) => drop(open.0.handshakes_failed.fetch_add(1, Relaxed)),
    }
}

async fn converse(
    socket: impl AsyncRead + AsyncWrite + Unpin,
    arrival: Arc<Arrival>,
    router: Router,
    mut told: watch::Receiver<()>,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Arrived(arrival.get()));
        router.clone().call(request)
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(socket), service));
    tokio::select! {
        // A client that goes away or speaks no HTTP is no error of ours.
        _ = connection.as_mut() => {}
        _ = told.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// A pair of ends, the server's with a clock.
    fn pair() -> (tokio::io::DuplexStream, Timed<tokio::io::DuplexStream>, Arc<Arrival>) {
        let (client, socket) = tokio::io::duplex(64);
        let arrival = Arc::new(Arrival { accepted: Instant::now(), after: AtomicU64::new(0) });
        (client, Timed { socket, arrival: arrival.clone(), fresh: true, untouched: true }, arrival)
    }

    #[tokio::test]
    async fn bytes_that_were_there_began_when_the_socket_was_accepted() {
        let (mut client, mut server, arrival) = pair();
        client.write_all(b"GET").await.unwrap();
        std::thread::sleep(Duration::from_millis(30));
        server.read_exact(&mut [0; 3]).await.unwrap();
        assert_eq!(arrival.get(), arrival.accepted, "the wait for us counts");
    }

    #[tokio::test]
    async fn a_client_that_thinks_is_not_counted_and_one_that_dawdles_is() {
        let (mut client, mut server, arrival) = pair();
        let (mut some, pause) = ([0; 2], Duration::from_millis(20));
        let mut last = arrival.accepted;
        for _ in 0..2 {
            // Silent between requests, and between the two halves of one.
            let read = async {
                server.read_exact(&mut some[..1]).await.unwrap();
                let began = Instant::now();
                server.read_exact(&mut some[1..]).await.unwrap();
                began
            };
            let send = async {
                tokio::time::sleep(pause).await;
                client.write_all(b"a").await.unwrap();
                tokio::time::sleep(pause).await;
                client.write_all(b"b").await.unwrap();
            };
            let (began, ()) = tokio::join!(read, send);
            assert!(arrival.get() >= last + pause && arrival.get() <= began);
            server.write_all(b"ok").await.unwrap();
            client.read_exact(&mut some).await.unwrap();
            last = Instant::now();
        }
    }
}
