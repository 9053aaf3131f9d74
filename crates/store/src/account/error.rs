//! What can go wrong with accounts, whose fault it is and what to do next.

use super::limit::Exceeded;
use crate::StoreError;
use ashlar_core::{Fault, Hint};

/// A failure of the accounts' database, or of what was asked of it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AccountError {
    /// The database refused or cannot be reached.
    #[error("accounts: {0}")]
    Sql(std::sync::Arc<sqlx::Error>),
    /// The file system refused.
    #[error("accounts: {0}")]
    Io(std::sync::Arc<StoreError>),
    /// A stored value that Ashlar would not have written.
    #[error("accounts: {0}")]
    Corrupt(String),
    /// The database was written by a newer program.
    #[error("the accounts have schema {found}, this program knows up to {known}")]
    Schema {
        /// Version in the database.
        found: i64,
        /// Highest version known here.
        known: i64,
    },
    /// Neither a file nor a PostgreSQL URL.
    #[error("accounts are kept in a file or in postgres://…, not in {0:?}")]
    Database(String),
    /// A setting that makes no sense.
    #[error("{field}: {why}")]
    Setting {
        /// The key, e.g. `price[2].input`.
        field: String,
        /// What is wrong.
        why: String,
    },
    /// A price list that is not TOML, or has keys it may not have.
    #[error("price list: {0}")]
    Toml(String),
    /// A price list whose version stands for another one already.
    #[error("usage was priced with another price list of version {0:?}")]
    PriceVersion(String),
    /// No such key or team.
    #[error("nothing is known as {0:?}")]
    NotFound(String),
    /// A key that was revoked cannot be changed.
    #[error("key {0} was revoked")]
    Revoked(String),
    /// A request id admitted twice.
    #[error("request {0} was admitted before")]
    AlreadyAdmitted(String),
    /// The lease ended under us and others have settled what we had open.
    #[error("this replica did not reach the database for longer than its lease; what it had open was settled by others")]
    Fenced,
    /// The accounts were closed.
    #[error("the accounts are closed")]
    Closed,
    /// The system's random source failed.
    #[error("no random bytes: {0}")]
    Random(String),
    /// The CSV writer failed.
    #[error("export: {0}")]
    Export(String),
}

impl From<sqlx::Error> for AccountError {
    fn from(e: sqlx::Error) -> Self {
        Self::Sql(e.into())
    }
}

impl From<StoreError> for AccountError {
    fn from(e: StoreError) -> Self {
        Self::Io(e.into())
    }
}

impl From<serde_json::Error> for AccountError {
    fn from(e: serde_json::Error) -> Self {
        Self::Corrupt(format!("not JSON: {e}"))
    }
}

impl Hint for AccountError {
    fn fault(&self) -> Fault {
        match self {
            Self::AlreadyAdmitted(_) | Self::Closed => Fault::Bug,
            Self::Sql(_) | Self::Io(_) | Self::Corrupt(_) | Self::Schema { .. } | Self::Fenced | Self::Random(_) | Self::Export(_) => {
                Fault::Environment
            }
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Schema { .. } => "use the newer program, or another database".into(),
            Self::Database(_) => "give the name of a file, or postgres://user@host/name".into(),
            Self::Sql(e) if matches!(**e, sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut) => {
                "check that the database runs and can be reached; nothing that was admitted is lost".into()
            }
            Self::PriceVersion(_) => "give the changed price list a version of its own".into(),
            Self::Fenced => "it goes on under a new lease; check the network to the database".into(),
            _ => return None,
        })
    }
}

/// Why a request was not admitted.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// A limit is used up. Not a failure: an answer for the client.
    #[error("{0}")]
    Exceeded(Box<Exceeded>),
    /// There is a limit of money, and what the request would cost is not known.
    #[error("there is a limit of money on this request, and {0}")]
    Unpriced(String),
    /// It could not be decided or written down.
    #[error(transparent)]
    Accounts(#[from] AccountError),
}

impl Hint for ReserveError {
    fn fault(&self) -> Fault {
        match self {
            Self::Accounts(e) => e.fault(),
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Accounts(e) => e.hint(),
            Self::Unpriced(_) => Some("add the rate to the price list, or ask for a model that has one".into()),
            Self::Exceeded(_) => None,
        }
    }
}
