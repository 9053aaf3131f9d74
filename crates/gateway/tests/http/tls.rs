//! TLS at the listener: spoken, and its certificate renewed under way.

use crate::{peers::skip, support::Server, value};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// A certificate for 127.0.0.1 that signs itself; `false` without openssl.
fn issue(cert: &Path, key: &Path) -> bool {
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "9", "-subj", "/CN=test"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args([std::ffi::OsStr::new("-keyout"), key.as_os_str(), "-out".as_ref(), cert.as_os_str()])
        .output();
    made.is_ok_and(|o| o.status.success())
}

/// The answer to GET `path` and the certificate shown, of which `trusted` is one.
async fn get(at: SocketAddr, path: &str, trusted: &[CertificateDer<'static>]) -> std::io::Result<(String, CertificateDer<'static>)> {
    let mut roots = rustls::RootCertStore::empty();
    trusted.iter().for_each(|c| roots.add(c.clone()).unwrap());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut socket = connector.connect(name, TcpStream::connect(at).await?).await?;
    let shown = socket.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
    let head = format!("GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes()).await?;
    let mut reply = String::new();
    socket.read_to_string(&mut reply).await?;
    Ok((reply, shown))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_shown_and_one_that_does_not_fit_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for n in ["1", "2"] {
        if !issue(&path(&format!("cert{n}")), &path(&format!("key{n}"))) {
            return skip("openssl");
        }
    }
    let certs: Vec<_> = ["cert1", "cert2"].map(|n| CertificateDer::from_pem_file(path(n)).unwrap()).into();
    let (cert, key) = (path("cert"), path("key"));
    let put = |n: &str, to: &Path| std::fs::copy(path(n), to).map(drop).unwrap();
    put("cert1", &cert);
    put("key1", &key);
    let toml = format!("[server]\ntls_cert = \"{}\"\ntls_key = \"{}\"\n", cert.display(), key.display());
    let server = Server::routed(&toml).await;
    let (reply, shown) = get(server.at, "/livez", &certs).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 200") && reply.ends_with("ok"), "{reply}");
    assert_eq!(shown, certs[0]);
    // Plain HTTP and strangers get no further than the handshake.
    let mut plain = TcpStream::connect(server.at).await.unwrap();
    plain.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
    assert!(get(server.at, "/livez", &certs[1..]).await.is_err());
    // Half of a renewal: the old pair stays, and it is said.
    put("cert2", &cert);
    let until = async |what: &str, done: &dyn Fn(&str, &CertificateDer<'_>) -> bool| {
        for _ in 0..100 {
            let (page, shown) = get(server.at, "/metrics", &certs).await.unwrap();
            if done(&page, &shown) {
                return page;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{what}: not after 5 s");
    };
    let failures = "ashlar:tls_certificate_failures_total";
    until("a pair that does not fit", &|page, shown| value(page, failures) == 1.0 && *shown == certs[0]).await;
    let (health, _) = get(server.at, "/health", &certs).await.unwrap();
    assert!(health.contains("cannot be used together"), "{health}");
    put("key2", &key);
    let page = until("the new pair", &|_, shown| *shown == certs[1]).await;
    assert_eq!(value(&page, "ashlar:tls_certificate_reloads_total"), 1.0);
    assert_eq!(value(&page, "ashlar:tls_handshakes_failed_total"), 2.0);
    let (health, _) = get(server.at, "/health", &certs).await.unwrap();
    assert!(health.contains("\"tls_error\":null"), "{health}");
    server.stop().await;
}
