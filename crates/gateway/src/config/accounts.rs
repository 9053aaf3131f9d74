//! `[accounts]`: where keys and usage are kept, and what things cost.

use super::ConfigError;
use ashlar_store::{AccountError, Database, PriceList};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// `[accounts]`. Read when the server starts; a change of it is refused until the
/// next start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccountsSettings {
    /// A file, or `postgres://user@host/name` for several replicas. Left out:
    /// `accounts.db` in the home folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// The environment variable that holds the database's address, for one with a
    /// password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database_env: Option<String>,
    /// The price list, a TOML file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prices: Option<PathBuf>,
    /// Whether only requests with a good key are answered.
    pub require_keys: bool,
    /// Tokens set aside for the answer to a request that does not limit it.
    pub assume_tokens: u32,
}

impl Default for AccountsSettings {
    fn default() -> Self {
        Self { database: None, database_env: None, prices: None, require_keys: false, assume_tokens: 4096 }
    }
}

fn invalid(key: &str, why: String) -> ConfigError {
    ConfigError::Invalid { path: format!("accounts.{key}"), why }
}

impl AccountsSettings {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.assume_tokens == 0 {
            return Err(invalid("assume_tokens", "it must be at least 1, got 0".into()));
        }
        let Some(database) = &self.database else { return Ok(()) };
        if self.database_env.is_some() {
            return Err(invalid("database_env", "database is given too: give one".into()));
        }
        let user = database.split_once("://").and_then(|(_, rest)| rest.split(['/', '?']).next()?.rsplit_once('@'));
        if user.is_some_and(|(user, _)| user.contains(':')) {
            return Err(invalid("database", "it holds a password: use database_env".into()));
        }
        database.parse::<Database>().map(drop).map_err(|e| invalid("database", e.to_string()))
    }

    /// Where the accounts of the home folder `home` are.
    ///
    /// # Errors
    /// When the environment variable is not set or holds no address.
    pub fn database(&self, home: &Path) -> Result<Database, ConfigError> {
        let bad = |key, e: AccountError| invalid(key, e.to_string());
        match (&self.database, &self.database_env) {
            (Some(database), _) => database.parse().map_err(|e| bad("database", e)),
            (None, Some(name)) => {
                let unset = |_| invalid("database_env", format!("the environment variable {name} is not set"));
                std::env::var(name).map_err(unset)?.parse().map_err(|e| bad("database_env", e))
            }
            (None, None) => Ok(Database::Sqlite(home.join("accounts.db"))),
        }
    }

    /// The price list, where one is named.
    ///
    /// # Errors
    /// When it cannot be read, naming its key at fault.
    pub fn price_list(&self) -> Result<Option<PriceList>, ConfigError> {
        let Some(path) = &self.prices else { return Ok(None) };
        let bad = |why: String| invalid("prices", format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        PriceList::parse(&text).map(Some).map_err(|e| bad(e.to_string()))
    }
}
