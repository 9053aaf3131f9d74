//! What can be found, sets of it, and a finding.

use std::fmt;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal, $tag:literal;)+) => {
        /// What was found; where findings touch, the earlier kind wins.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $($(#[$doc])* $kind,)+
        }

        impl Kind {
            /// Every kind, strongest first.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$kind),+];

            /// Its name in reports.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$kind => $name,)+ }
            }

            /// Its name in tags and placeholders.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$kind => $tag,)+ }
            }

            /// What it is replaced by.
            pub const fn tag(self) -> &'static str {
                match self { $(Self::$kind => concat!("<", $tag, ">"),)+ }
            }
        }
    };
}

kinds! {
    /// A key, token, password or private key.
    Secret = "secret", "SECRET";
    /// A bank account number that passes the mod-97 check.
    Iban = "iban", "IBAN";
    /// A payment card number that passes the Luhn check.
    Card = "card", "CARD";
    /// A wallet's address whose checksum holds.
    Crypto = "crypto", "CRYPTO";
    /// A social security number of the United States.
    Ssn = "us_ssn", "US_SSN";
    /// A taxpayer number of the United States for those without an SSN.
    Itin = "us_itin", "US_ITIN";
    /// A number of the British National Health Service (mod 11).
    Nhs = "uk_nhs", "UK_NHS";
    /// A British National Insurance number.
    Nino = "uk_nino", "UK_NINO";
    /// A Spanish DNI, NIF or NIE with its control letter.
    Nif = "es_nif", "ES_NIF";
    /// An Italian fiscal code of a person with its control letter.
    FiscalCode = "it_fiscal_code", "IT_FISCAL_CODE";
    /// A German tax identification number (ISO 7064 mod 11, 10).
    SteuerId = "de_tax_id", "DE_TAX_ID";
    /// A Polish PESEL with its date and check digit.
    Pesel = "pl_pesel", "PL_PESEL";
    /// An Indian Aadhaar number (Verhoeff).
    Aadhaar = "in_aadhaar", "IN_AADHAAR";
    /// An Australian tax file number (mod 11).
    Tfn = "au_tfn", "AU_TFN";
    /// An Australian business number (mod 89).
    Abn = "au_abn", "AU_ABN";
    /// A Singaporean NRIC or FIN with its control letter.
    Nric = "sg_nric", "SG_NRIC";
    /// A passport's number, named as one.
    Passport = "passport", "PASSPORT";
    /// A date named as someone's birth.
    BirthDate = "birth_date", "BIRTH_DATE";
    /// An e-mail address.
    Email = "email", "EMAIL";
    /// A telephone number.
    Phone = "phone", "PHONE";
    /// An IPv4 or IPv6 address of a host.
    Ip = "ip", "IP";
    /// A network interface's address.
    Mac = "mac", "MAC";
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Kind {
    type Err = UnknownKind;

    /// Reads [`Kind::as_str`].
    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        let known = Self::ALL.into_iter().find(|k| k.as_str() == name);
        known.ok_or_else(|| UnknownKind {
            name: name.to_owned(),
        })
    }
}

/// A name that is no [`Kind`]'s.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no kind of personal data is called `{name}`; there are {}", Kind::ALL.map(Kind::as_str).join(", "))]
pub struct UnknownKind {
    /// The name.
    pub name: String,
}

/// A set of [`Kind`]s.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Kinds(u32);

impl Kinds {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self((1 << Kind::ALL.len()) - 1);
    /// What [`pii`](super::pii) and [`redact`](super::redact) look for.
    pub const CORE: Self = Self::NONE
        .with(Kind::Secret)
        .with(Kind::Card)
        .with(Kind::Iban)
        .with(Kind::Email)
        .with(Kind::Phone)
        .with(Kind::Ip);

    /// These and `kind`.
    #[must_use]
    pub const fn with(self, kind: Kind) -> Self {
        Self(self.0 | 1 << kind as u32)
    }

    /// These without `kind`.
    #[must_use]
    pub const fn without(self, kind: Kind) -> Self {
        Self(self.0 & !(1 << kind as u32))
    }

    /// Whether `kind` is one of these.
    pub const fn has(self, kind: Kind) -> bool {
        self.0 & (1 << kind as u32) != 0
    }

    /// Whether these are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether one of `other` is among these.
    pub const fn any(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Each of them, strongest first.
    pub fn iter(self) -> impl Iterator<Item = Kind> {
        Kind::ALL.into_iter().filter(move |k| self.has(*k))
    }
}

impl FromIterator<Kind> for Kinds {
    fn from_iter<I: IntoIterator<Item = Kind>>(kinds: I) -> Self {
        kinds.into_iter().fold(Self::NONE, Self::with)
    }
}

impl fmt::Debug for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// One finding: bytes `start..end` of the text, on character boundaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}
