//! The listener's certificate, read again when its files change.
//!
//! The files' bytes are compared, not their times, as for the configuration
//! file. A pair that does not fit, as while a tool is writing one after the
//! other, is refused, said so in /health and /metrics, and the old pair stays.
//!
//! What may not happen here: a server that was started with TLS answers without
//! it, or the other way round, because a file changed.

use crate::config::{ConfigError, ServerSettings};
use ashlar_core::Digest;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
};
use tokio_rustls::TlsAcceptor;

/// What the listener speaks.
pub(crate) struct Tls {
    now: RwLock<Option<TlsAcceptor>>,
    state: Mutex<State>,
}

/// What came of the files.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    /// Of the files last looked at.
    digest: Option<Digest>,
    pub(crate) reloads: u64,
    pub(crate) failures: u64,
    /// Why the files as they are now are not in force.
    pub(crate) error: Option<String>,
}

/// Certificate and key as bytes, where the settings name them.
type Pair = (Vec<u8>, Vec<u8>);

fn read(settings: &ServerSettings) -> Result<Option<Pair>, ConfigError> {
    let (Some(cert), Some(key)) = (&settings.tls_cert, &settings.tls_key) else { return Ok(None) };
    let file = |name: &str, path: &Path| {
        std::fs::read(path).map_err(|e| invalid(name, format!("cannot read {}: {e}", path.display())))
    };
    Ok(Some((file("tls_cert", cert)?, file("tls_key", key)?)))
}

fn invalid(key: &str, why: String) -> ConfigError {
    ConfigError::Invalid { path: format!("server.{key}"), why }
}

fn digest((cert, key): &Pair) -> Digest {
    Digest::of(&[Digest::of(cert).as_bytes().as_slice(), Digest::of(key).as_bytes().as_slice()].concat())
}

fn acceptor((cert, key): &Pair) -> Result<TlsAcceptor, ConfigError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(cert).collect();
    let chain = chain.map_err(|e| invalid("tls_cert", format!("it is no PEM: {e}")))?;
    if chain.is_empty() {
        return Err(invalid("tls_cert", "it holds no certificate in PEM".into()));
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| invalid("tls_key", format!("it holds no private key in PEM: {e}")))?;
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, key));
    let mut config = config.map_err(|e| invalid("tls_key", format!("certificate and key cannot be used together: {e}")))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

impl Tls {
    /// The certificate the settings name, if they do.
    ///
    /// # Errors
    /// When it cannot be read or used.
    pub(crate) fn new(settings: &ServerSettings) -> Result<Self, ConfigError> {
        let pair = read(settings)?;
        let state = State { digest: pair.as_ref().map(digest), ..State::default() };
        let now = pair.as_ref().map(acceptor).transpose()?;
        Ok(Self { now: RwLock::new(now), state: Mutex::new(state) })
    }

    /// `None` on a server without TLS.
    pub(crate) fn acceptor(&self) -> Option<TlsAcceptor> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What came of the files.
    pub(crate) fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at the files; others than the last ones are put to work, or refused.
    pub(crate) fn follow(&self, settings: &ServerSettings) {
        let on = self.acceptor().is_some();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let made = match read(settings) {
            Ok(None) if !on => {
                state.error = None;
                return;
            }
            Ok(Some(pair)) if on => {
                let digest = digest(&pair);
                if state.digest == Some(digest) {
                    return;
                }
                state.digest = Some(digest);
                acceptor(&pair)
            }
            Ok(_) => Err(invalid("tls_cert", "TLS is turned on or off when the server starts: restart it".into())),
            Err(e) => {
                // Readable again, it is looked at as if it were new.
                state.digest = None;
                Err(e)
            }
        };
        match made {
            Ok(new) => {
                *self.now.write().unwrap_or_else(PoisonError::into_inner) = Some(new);
                state.reloads += 1;
                state.error = None;
            }
            // Said once, looked at every second.
            Err(e) if state.error.as_deref() == Some(&e.to_string()) => {}
            Err(e) => {
                state.failures += 1;
                state.error = Some(e.to_string());
            }
        }
    }
}
