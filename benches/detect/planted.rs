//! Texts with planted personal data and secrets, and what looks like them.
//!
//! Deterministic by a seed, from words of this file only. Check digits are
//! computed here and not by the crate under test: each is tried until the rule
//! holds as its publisher states it. What is planted is random, so no value is
//! a person's but by accident.

use ashlar_text::detect::Kind;
use sha2::{Digest, Sha256};

/// A text and the bytes of what is in it.
#[derive(Debug, Default)]
pub struct Document {
    /// The text.
    pub text: String,
    /// Kind, first byte, one past the last byte; in order.
    pub plants: Vec<(Kind, usize, usize)>,
}

/// `n` documents of about `sentences` sentences; every fourth sentence has a
/// plant, every fourth a look-alike, for `dense`; else every hundredth.
pub fn documents(seed: u64, n: usize, sentences: usize, dense: bool) -> Vec<Document> {
    let mut r = Random(seed);
    (0..n).map(|_| document(&mut r, sentences, dense)).collect()
}

fn document(r: &mut Random, sentences: usize, dense: bool) -> Document {
    let mut d = Document::default();
    for _ in 0..sentences {
        match r.below(if dense { 4 } else { 100 }) {
            0 => plant(r, &mut d),
            1 => {
                let s = lookalike(r);
                d.text += &s;
            }
            _ => prose(r, &mut d.text),
        }
        d.text.push(if r.below(5) == 0 { '\n' } else { ' ' });
    }
    d
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }

    fn pick<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.below(list.len())]
    }

    fn from(&mut self, alphabet: &str, n: usize) -> String {
        let alphabet = alphabet.as_bytes();
        (0..n).map(|_| char::from(alphabet[self.below(alphabet.len())])).collect()
    }

    fn digits(&mut self, n: usize) -> String {
        self.from("0123456789", n)
    }

    fn hex(&mut self, n: usize) -> String {
        self.from("0123456789abcdef", n)
    }
}

const ALNUM: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
const UPPER: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const FIRST: [&str; 12] = [
    "anna", "james", "maria", "li", "omar", "sofia", "peter", "priya", "noah", "emma", "jan", "fatima",
];
const LAST: [&str; 12] = [
    "berger", "smith", "rossi", "chen", "haddad", "garcia", "novak", "sharma", "miller", "larsen", "kowalski", "khan",
];

fn prose(r: &mut Random, out: &mut String) {
    const SUBJECTS: [&str; 10] = [
        "The committee", "A colleague from the second floor", "Our supplier", "The new schedule",
        "Everyone in the office", "The report", "Her sister's company", "The river", "This method",
        "The museum in the old town",
    ];
    const VERBS: [&str; 10] = [
        "explained", "has postponed", "describes", "could not find", "welcomed", "is about",
        "depends on", "will replace", "never mentioned", "started with",
    ];
    const OBJECTS: [&str; 10] = [
        "the plan for the coming months", "a long list of open questions",
        "what had been agreed before the summer", "the well-known bridge near the station",
        "several reasons why the work took longer", "the costs of heating and light",
        "an old story (nobody knows who told it first)", "the results of the survey",
        "a simpler way to do the same thing", "the meeting's main topic: trust",
    ];
    const TAILS: [&str; 8] = [
        "", ", although nobody asked", " in 2023", " on page 14", ", as 37 others did",
        " without saying so", " by 8 percent", "; that was to be expected",
    ];
    *out += r.pick(&SUBJECTS);
    out.push(' ');
    *out += r.pick(&VERBS);
    out.push(' ');
    *out += r.pick(&OBJECTS);
    *out += r.pick(&TAILS);
    out.push('.');
}

/// A sentence with one plant: `{}` is where it stands.
fn plant(r: &mut Random, d: &mut Document) {
    let kind = Kind::ALL[r.below(Kind::ALL.len())];
    let (value, sentence) = planted(r, kind);
    let (before, after) = sentence.split_once("{}").unwrap_or((sentence, ""));
    d.text += before;
    let start = d.text.len();
    d.text += &value;
    d.plants.push((kind, start, d.text.len()));
    d.text += after;
}

/// Tries values until the check holds.
fn until(mut value: impl FnMut() -> String, check: impl Fn(&str) -> bool) -> String {
    loop {
        let v = value();
        if check(&v) {
            return v;
        }
    }
}

fn grouped(digits: &str, sizes: &[usize], by: &str) -> String {
    let mut at = 0;
    let groups = sizes.iter().map(|n| {
        at += n;
        &digits[at - n..at]
    });
    groups.collect::<Vec<_>>().join(by)
}

fn weighted(digits: &str, weights: &[u32]) -> u32 {
    digits.bytes().zip(weights).map(|(d, w)| u32::from(d - b'0') * w).sum()
}

fn planted(r: &mut Random, kind: Kind) -> (String, &'static str) {
    let coin = r.below(2) == 0;
    match kind {
        Kind::Secret => secret(r),
        Kind::Card => {
            let (head, n) = [("4", 16), ("52", 16), ("34", 15), ("6011", 16), ("37", 15)][r.below(5)];
            let v = until(|| head.to_owned() + &r.digits(n - head.len()), luhn);
            let by = ["", " ", "-"][r.below(3)];
            let v = if n == 15 { grouped(&v, &[4, 6, 5], by) } else { grouped(&v, &[4, 4, 4, 4], by) };
            (v, r.pick(&["Please charge my card {} today.", "She paid with {}, as before.", "The Visa number is {}."]))
        }
        Kind::Iban => {
            let (country, n, letters) = [("DE", 18, 0), ("GB", 14, 4), ("FR", 23, 0), ("NL", 10, 4), ("ES", 20, 0)][r.below(5)];
            let body = r.from(UPPER, letters) + &r.digits(n);
            let v = (0..100).map(|c| format!("{country}{c:02}{body}")).find(|v| mod97(v)).unwrap_or_default();
            let v = if coin { v } else { spaced(&v) };
            (v, r.pick(&["Transfer it to {} by Friday.", "My account is {}, please.", "IBAN: {}"]))
        }
        Kind::Crypto => {
            let v = if coin { base58(r) } else { bech32(r) };
            (v, r.pick(&["Send the coins to {} now.", "The wallet {} received nothing.", "Donations: {}"]))
        }
        Kind::Ssn => {
            let v = until(|| r.digits(9), |v| {
                let area = &v[..3];
                area != "000" && area != "666" && !v.starts_with('9') && &v[3..5] != "00" && &v[5..] != "0000"
            });
            let by = ["-", " "][r.below(2)];
            (grouped(&v, &[3, 2, 4], by), r.pick(&["My SSN is {}.", "Social security number {} was on the form.", "SSN: {}"]))
        }
        Kind::Itin => {
            let v = format!("9{}-7{}-{}", r.digits(2), r.below(9), r.digits(4));
            (v, r.pick(&["His ITIN is {}.", "Taxpayer ID (ITIN): {}", "The individual taxpayer number {} is missing."]))
        }
        Kind::Nhs => {
            let v = until(|| r.digits(10), |v| {
                let c = 11 - weighted(v, &[10, 9, 8, 7, 6, 5, 4, 3, 2]) % 11;
                c != 10 && v[9..].parse() == Ok(c % 11) && !v.starts_with('0')
            });
            let v = if coin { v } else { grouped(&v, &[3, 3, 4], " ") };
            (v, r.pick(&["The patient's NHS number is {}.", "NHS no. {} has been referred.", "Patient {} came in on Monday."]))
        }
        Kind::Nino => {
            let v = format!("{}{}{}", r.pick(&["AB", "JG", "CE", "WK", "PR"]), r.digits(6), r.from("ABCD", 1));
            let v = if coin { v } else { grouped(&v, &[2, 2, 2, 2, 1], " ") };
            (v, r.pick(&["National Insurance number {} please.", "His NINO is {}.", "We have {} on file for her."]))
        }
        Kind::Nif => {
            let n = 10_000_000 + r.below(89_999_999);
            let v = format!("{n}{}", char::from(b"TRWAGMYFPDXBNJZSQVHLCKE"[n % 23]));
            (v, r.pick(&["Her DNI is {}.", "El NIF {} no es correcto.", "The tenant, {}, signed today."]))
        }
        Kind::FiscalCode => {
            let v = until(
                || format!(
                    "{}{}{}{:02}{}{}{}",
                    r.from("BCDFGLMNPRSTVZ", 6), r.digits(2), r.from("ABCDEHLMPRST", 1), 1 + r.below(28),
                    r.from("ABCDEFGHIL", 1), r.digits(3), r.from(UPPER, 1)
                ),
                fiscal_code,
            );
            (v, r.pick(&["Codice fiscale: {}", "His fiscal code is {}.", "Il contribuente {} ha firmato."]))
        }
        Kind::SteuerId => {
            let v = until(|| r.digits(11), steuer_id);
            let v = if coin { v } else { grouped(&v, &[2, 3, 3, 3], " ") };
            (v, r.pick(&["Meine Steuer-ID ist {}.", "Her German tax ID is {}.", "Steueridentifikationsnummer: {}"]))
        }
        Kind::Pesel => {
            let v = until(|| format!("{:02}{:02}{:02}{}", r.below(99), 1 + r.below(12), 1 + r.below(28), r.digits(5)), |v| {
                weighted(v, &[1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1]) % 10 == 0
            });
            (v, r.pick(&["PESEL: {}", "Jej numer PESEL to {}.", "Her PESEL is {}, she said."]))
        }
        Kind::Aadhaar => {
            let v = until(|| format!("{}{}", 2 + r.below(8), r.digits(11)), verhoeff);
            let v = if coin { v } else { grouped(&v, &[4, 4, 4], " ") };
            (v, r.pick(&["My Aadhaar number is {}.", "Aadhaar: {}", "Aadhaar {} is linked to the account."]))
        }
        Kind::Tfn => {
            let v = until(|| r.digits(9), |v| {
                !v.starts_with('0') && weighted(v, &[1, 4, 3, 7, 5, 8, 6, 9, 10]) % 11 == 0
            });
            let v = if coin { v } else { grouped(&v, &[3, 3, 3], " ") };
            (v, r.pick(&["My TFN is {}.", "Tax file number: {}", "The TFN {} was refused."]))
        }
        Kind::Abn => {
            let v = until(|| r.digits(11), |v| {
                !v.starts_with('0') && (weighted(v, &[10, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19]) - 10) % 89 == 0
            });
            let v = if coin { v } else { grouped(&v, &[2, 3, 3, 3], " ") };
            (v, r.pick(&["ABN {} is registered.", "Our ABN: {}", "The business number (ABN) is {}."]))
        }
        Kind::Nric => {
            let v = until(|| r.from("STFG", 1) + &r.digits(7) + &r.from(UPPER, 1), nric);
            (v, r.pick(&["His NRIC is {}.", "FIN {} expires soon.", "The employee {} has left."]))
        }
        Kind::Passport => {
            let v = if coin { r.digits(9) } else { r.from("CFGHJK", 1) + &r.digits(8) };
            (v, r.pick(&["Her passport number is {}.", "Passport no. {} was stolen.", "passport: {}"]))
        }
        Kind::BirthDate => {
            let (y, m, day) = (1930 + r.below(80), 1 + r.below(12), 1 + r.below(28));
            let month = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"][m - 1];
            let v = match r.below(4) {
                0 => format!("{y}-{m:02}-{day:02}"),
                1 => format!("{day:02}/{m:02}/{y}"),
                2 => format!("{day} {month} {y}"),
                _ => format!("{month} {day}, {y}"),
            };
            (v, r.pick(&["He was born on {} in Lyon.", "Date of birth: {}", "DOB {} as stated."]))
        }
        Kind::Email => {
            let (first, last) = (r.pick(&FIRST), r.pick(&LAST));
            let host = r.pick(&["example.org", "mail.example.com", "example.co.uk", "uni-example.de", "example.io"]);
            let v = match r.below(4) {
                0 => format!("{first}.{last}@{host}"),
                1 => format!("{first}{}@{host}", r.below(100)),
                2 => format!("{}_{last}+news@{host}", &first[..1]),
                _ => format!("{last}@{host}"),
            };
            (v, r.pick(&["Write to {} for details.", "My address is {}.", "Contact: {} (weekdays)"]))
        }
        Kind::Phone => {
            let v = match r.below(6) {
                0 => format!("+49 30 {}", r.digits(7)),
                1 => format!("+44 20 7946 {}", r.digits(4)),
                2 => format!("+1 415 {}-{}", r.from("2345", 3), r.digits(4)),
                3 => format!("({}) {}-{}", r.pick(&["415", "212", "617"]), r.from("2345678", 3), r.digits(4)),
                4 => format!("{}-{}-{}", r.pick(&["415", "212", "617"]), r.from("2345678", 3), r.digits(4)),
                _ => format!("+33 1 {}", grouped(&r.digits(8), &[2, 2, 2, 2], " ")),
            };
            (v, r.pick(&["Call me at {} tonight.", "Phone: {}", "You can reach us on {}.", "She left {} with the desk."]))
        }
        Kind::Ip => {
            let v = if coin {
                format!("{}.{}.{}.{}", 20 + r.below(180), r.below(255), r.below(255), 1 + r.below(254))
            } else {
                let parts: Vec<String> = (0..8).map(|_| r.from("123456789abcdef", 1) + &r.hex(3)).collect();
                parts.join(":")
            };
            (v, r.pick(&["The request came from {} at night.", "Server {} is down.", "Block {} please."]))
        }
        Kind::Mac => {
            let pairs: Vec<String> = (0..6).map(|_| r.hex(2)).collect();
            let v = pairs.join(if coin { ":" } else { "-" });
            (v, r.pick(&["The adapter {} is unknown.", "MAC address: {}", "Its interface has {} printed on it."]))
        }
    }
}

fn secret(r: &mut Random) -> (String, &'static str) {
    const KEYS: [&str; 3] = ["The key {} was in the log.", "Use {} for the test, then revoke it.", "Authentication with {} failed."];
    let url = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    // Base64 of a hyphen at the end would end the sentence's word elsewhere.
    let body = |r: &mut Random, n: usize| r.from(url, n - 1) + &r.from(ALNUM, 1);
    let value = match r.below(22) {
        0 => format!("AKIA{}", r.from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16)),
        1 => format!("ghp_{}", r.from(ALNUM, 36)),
        2 => format!("github_pat_{}_{}", r.from(ALNUM, 22), r.from(ALNUM, 59)),
        3 => format!("glpat-{}", body(r, 20)),
        4 => format!("xoxb-{}-{}-{}", r.digits(12), r.digits(12), r.from(ALNUM, 24)),
        5 => format!("sk_live_{}", r.from(ALNUM, 24)),
        6 => format!("sk-proj-{}", body(r, 48)),
        7 => format!("sk-ant-api03-{}", body(r, 93)),
        8 => format!("hf_{}", r.from(ALNUM, 34)),
        9 => format!("npm_{}", r.from(ALNUM, 36)),
        10 => format!("pypi-AgEIcHlwaS5vcmc{}", body(r, 80)),
        11 => format!("SG.{}.{}", body(r, 22), body(r, 43)),
        12 => format!("SK{}", r.hex(32)),
        13 => format!("AIza{}", body(r, 35)),
        14 => format!("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJ{}.{}", body(r, 60), body(r, 43)),
        15 => {
            let lines: Vec<String> = (0..5).map(|_| r.from(ALNUM, 64)).collect();
            let v = format!("-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----", lines.join("\n"));
            return (v, "The file held\n{}\nand nothing else.");
        }
        16 => return (password(r), "postgres://app:{}@db:5432/main is what it connects to."),
        17 => return (password(r), "The password is {} for now."),
        18 => return (password(r), "DB_PASSWORD=\"{}\" in the file."),
        19 => return (r.hex(32), "api_key: {}"),
        20 => return (r.from(ALNUM, 24), "{\"client_secret\": \"{}\"}"),
        _ => return (r.from(ALNUM, 30), "Authorization: Bearer {}"),
    };
    (value, r.pick(&KEYS))
}

fn password(r: &mut Random) -> String {
    format!("{}{}{}{}", r.pick(&["Blue", "tiger", "Winter", "qWe", "green"]), r.from(ALNUM, 5), r.from("!#$%&+", 1), r.digits(2))
}

/// What must be left alone.
fn lookalike(r: &mut Random) -> String {
    let luhn_off = || |v: &str| !luhn(v);
    match r.below(26) {
        0 => format!("Order 302-{}-{} has shipped.", r.digits(7), r.digits(7)),
        1 => format!("We run version {}.{}.{}.{} since May.", r.below(9), r.below(9), r.below(20), r.below(9)),
        2 => format!("Firmware 10.{}.{}.{} fixes it.", r.below(99), r.below(99), r.below(99)),
        3 => format!("Logged at 2024-0{}-1{}T0{}:{}:21Z.", 1 + r.below(9), r.below(9), r.below(9), 10 + r.below(49)),
        4 => format!("Commit {} broke it.", r.hex(40)),
        5 => format!("sha256:{} is the digest.", r.hex(64)),
        6 => format!("Request {}-{}-4{}-a{}-{} timed out.", r.hex(8), r.hex(4), r.hex(3), r.hex(3), r.hex(12)),
        7 => format!("Item {} is sold out.", until(|| format!("4{}", r.digits(15)), luhn_off())),
        8 => format!("Reference {} was not found.", grouped(&until(|| format!("52{}", r.digits(14)), luhn_off()), &[4, 4, 4, 4], " ")),
        9 => format!("Code DE{} was rejected.", r.digits(20)),
        10 => format!("Invoice 2024-{} is due.", r.digits(6)),
        11 => format!("The ISBN is 978-3-16-{}-{}.", r.digits(6), r.below(9)),
        12 => format!("Ticket {} was closed.", r.digits(9)),
        13 => format!("Serial number {} is on the back.", r.digits(10)),
        14 => format!("It took {} nanoseconds.", r.digits(10)),
        15 => format!("The price rose from 1,{} to 2,{} euros.", r.digits(3), r.digits(3)),
        16 => format!("Install it with lodash@4.{}.{} first.", r.below(20), r.below(30)),
        17 => "Set password: required in the schema.".to_owned(),
        18 => "Then write api_key = \"your-api-key-here\" there.".to_owned(),
        19 => format!("max_tokens = {}, temperature = 0.{}", r.digits(4), r.below(9)),
        20 => format!("The coordinates are 52.{}, 13.{}.", r.digits(6), r.digits(6)),
        21 => format!("Tracking number {} is on its way.", r.digits(12)),
        22 => format!("The transaction {} had {} parts.", r.digits(11), 2 + r.below(8)),
        23 => format!("Use sk-learn-style-estimators, see section {}.{}.{}.{}", 1 + r.below(9), r.below(9), r.below(9), r.below(9)),
        24 => format!("The meeting on 1{}/0{}/2024 starts at 1{}:30.", r.below(9), 1 + r.below(9), r.below(9)),
        _ => format!("The address 1{} is no wallet.", r.from("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", 33)),
    }
}

fn luhn(digits: &str) -> bool {
    let sum: u32 = digits.bytes().rev().enumerate().map(|(i, b)| {
        let d = u32::from(b - b'0') * (1 + i as u32 % 2);
        d / 10 + d % 10
    }).sum();
    sum % 10 == 0
}

fn mod97(iban: &str) -> bool {
    let turned = iban[4..].to_owned() + &iban[..4];
    let digits: String = turned.chars().filter_map(|c| c.to_digit(36)).map(|d| d.to_string()).collect();
    digits.bytes().fold(0, |rest, d| (rest * 10 + u32::from(d - b'0')) % 97) == 1
}

fn spaced(iban: &str) -> String {
    let groups: Vec<String> = iban.as_bytes().chunks(4).map(|c| String::from_utf8_lossy(c).into_owned()).collect();
    groups.join(" ")
}

fn steuer_id(v: &str) -> bool {
    let times: Vec<usize> = ('0'..='9').map(|d| v[..10].matches(d).count()).collect();
    let repeated: Vec<&usize> = times.iter().filter(|t| **t > 1).collect();
    let mut p = 10;
    for d in v[..10].bytes() {
        let s = match (u32::from(d - b'0') + p) % 10 { 0 => 10, s => s };
        p = 2 * s % 11;
    }
    !v.starts_with('0') && repeated.len() == 1 && *repeated[0] <= 3 && v[10..].parse() == Ok((11 - p) % 10)
}

/// By Verhoeff's tables.
fn verhoeff(v: &str) -> bool {
    const D: [&str; 10] = [
        "0123456789", "1234067895", "2340178956", "3401289567", "4012395678", "5987604321", "6598710432",
        "7659821043", "8765932104", "9876543210",
    ];
    const P: [&str; 8] = [
        "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415",
        "7046913258",
    ];
    let cell = |row: &str, i: u8| row.as_bytes()[usize::from(i)] - b'0';
    v.bytes().rev().enumerate().fold(0, |c, (i, d)| cell(D[usize::from(c)], cell(P[i % 8], d - b'0'))) == 0
}

fn nric(v: &str) -> bool {
    let offset = if v.starts_with(['T', 'G']) { 4 } else { 0 };
    let letters = if v.starts_with(['S', 'T']) { "JZIHGFEDCBA" } else { "XWUTRQPNMLK" };
    let sum = weighted(&v[1..8], &[2, 7, 6, 5, 4, 3, 2]) + offset;
    letters.as_bytes()[sum as usize % 11] == v.as_bytes()[8]
}

fn fiscal_code(v: &str) -> bool {
    const ODD: &str = "BAKPLCQDREVOSFTGUHMINJWZYX";
    let sum: usize = v[..15].bytes().enumerate().map(|(i, c)| {
        let n = if c.is_ascii_digit() { c - b'0' } else { c - b'A' };
        match i % 2 {
            // The table lists what letter has which value; this is its inverse.
            0 => ODD.find(char::from(b'A' + n)).unwrap_or(0),
            _ => usize::from(n),
        }
    }).sum();
    sum % 26 == usize::from(v.as_bytes()[15] - b'A')
}

fn base58(r: &mut Random) -> String {
    const ALPHABET: &[u8] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
    let mut bytes = vec![[0, 5][r.below(2)]];
    bytes.extend((0..20).map(|_| r.next() as u8 | 1));
    let check = Sha256::digest(Sha256::digest(&bytes));
    bytes.extend(&check[..4]);
    let zeros = bytes.iter().take_while(|b| **b == 0).count();
    let mut out = Vec::new();
    while bytes.iter().any(|b| *b != 0) {
        let mut rest = 0u32;
        for b in &mut bytes {
            rest = rest * 256 + u32::from(*b);
            *b = (rest / 58) as u8;
            rest %= 58;
        }
        out.push(ALPHABET[rest as usize]);
    }
    out.extend(std::iter::repeat_n(b'1', zeros));
    out.reverse();
    String::from_utf8_lossy(&out).into_owned()
}

fn bech32(r: &mut Random) -> String {
    const ALPHABET: &[u8] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
    let mut data = vec![0];
    data.extend((0..32).map(|_| r.below(32) as u8));
    let polymod = |values: &[u8]| {
        values.iter().fold(1u32, |c, v| {
            let top = c >> 25;
            let c = (c & 0x1ff_ffff) << 5 ^ u32::from(*v);
            [0x3b6a_57b2, 0x2650_8e6d, 0x1ea1_19fa, 0x3d42_33dd, 0x2a14_62b3]
                .iter()
                .enumerate()
                .fold(c, |c, (i, g)| if top >> i & 1 == 1 { c ^ g } else { c })
        })
    };
    let mut values = vec![3, 3, 0, 2, 3];
    values.extend(&data);
    values.extend([0; 6]);
    let check = polymod(&values) ^ 1;
    data.extend((0..6).map(|i| (check >> (5 * (5 - i)) & 31) as u8));
    let data = data.iter().map(|v| char::from(ALPHABET[usize::from(*v)]));
    "bc1".chars().chain(data).collect()
}
