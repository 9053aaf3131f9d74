//! DSSE v1: a payload, its type, and a signature over both.
//!
//! What is signed is the pre-authentication encoding, so that neither the type
//! nor the payload can be read as the other. Only canonical base64 is taken: one
//! payload has one spelling.

use crate::{
    GovernError,
    keys::{Private, Public},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

/// The type of every payload signed here.
pub(crate) const IN_TOTO: &str = "application/vnd.in-toto+json";

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Signature {
    sig: String,
    #[serde(default)]
    keyid: Option<String>,
}

/// `DSSEv1 <bytes of type> <type> <bytes of payload> <payload>`
fn pae(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    )
    .into_bytes();
    out.extend_from_slice(payload);
    out
}

fn decode(what: &str, text: &str) -> Result<Vec<u8>, GovernError> {
    STANDARD
        .decode(text)
        .map_err(|e| GovernError::Malformed(format!("{what} is not canonical base64: {e}")))
}

impl Envelope {
    /// Signs `payload`; `keyid` is advice to the reader, and not signed.
    pub(crate) fn seal(payload: &[u8], key: &Private, keyid: String) -> Result<Self, GovernError> {
        Ok(Self {
            payload: STANDARD.encode(payload),
            payload_type: IN_TOTO.into(),
            signatures: vec![Signature {
                sig: STANDARD.encode(key.sign(&pae(IN_TOTO, payload))?),
                keyid: Some(keyid),
            }],
        })
    }

    /// The payload, once its one signature holds under `key`.
    pub(crate) fn open(&self, key: &Public) -> Result<Vec<u8>, GovernError> {
        if self.payload_type != IN_TOTO {
            return Err(GovernError::unsupported(
                "payloadType",
                &self.payload_type,
                IN_TOTO,
            ));
        }
        let [signature] = self.signatures.as_slice() else {
            return Err(GovernError::Malformed(format!(
                "{} signatures, one is wanted",
                self.signatures.len()
            )));
        };
        key.expect_id(signature.keyid.as_deref())?;
        let payload = decode("the payload", &self.payload)?;
        key.verify(
            &pae(&self.payload_type, &payload),
            &decode("the signature", &signature.sig)?,
        )?;
        Ok(payload)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn encoding_is_that_of_the_protocol() {
        // The example in the DSSE specification, protocol.md.
        assert_eq!(
            super::pae("http://example.com/HelloWorld", b"hello world"),
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }
}
