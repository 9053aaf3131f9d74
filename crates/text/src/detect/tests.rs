//! Plants that must all be found, and look-alikes that must all be left alone.

use super::*;
use proptest::prelude::*;

/// Each line holds what stands between `⟦` and `⟧`, and nothing else.
const PLANTS: &[(Kind, &str)] = &[
    (Kind::Email, "Write to ⟦anna.berger@example.org⟧."),
    (Kind::Email, "mailto:⟦o'neil+hr@sub.example.co.uk⟧, please"),
    (Kind::Email, "⟦jürgen@müller-söhne.de⟧: er weiß es"),
    (Kind::Email, "reach ⟦anna [at] example [dot] org⟧ or"),
    (Kind::Email, "⟦anna(at)example.org⟧"),
    (Kind::Phone, "Call ⟦+49 30 1234567⟧ today"),
    (Kind::Phone, "⟦+49 (0)30 / 123 45-67⟧"),
    (Kind::Phone, "⟦+491711234567⟧"),
    (Kind::Phone, "mobile ⟦+1 415 555 2671⟧ 2024-05-12"),
    (Kind::Phone, "⟦+44 20 7946 0958⟧, from ⟦0044 20 7946 0958⟧"),
    (Kind::Phone, "Zentrale ⟦030 1234567⟧ und ⟦089/12345678⟧"),
    (
        Kind::Phone,
        "⟦(030) 123 45 67⟧, ⟦0171-1234567⟧, ⟦01711234567⟧",
    ),
    (
        Kind::Phone,
        "⟦(415) 555-2671⟧ or ⟦415-555-2671⟧ or ⟦415.555.2671⟧",
    ),
    (Kind::Phone, "⟦1-800-555-0199⟧"),
    (Kind::Phone, "Phone: ⟦555-0199⟧"),
    (Kind::Phone, "Telefon Nr. ⟦0815 4711⟧"),
    (Kind::Phone, "Rufnummer ⟦0351 4567890⟧"),
    (Kind::Card, "card ⟦4111 1111 1111 1111⟧ exp 12/26"),
    (Kind::Card, "⟦5500-0000-0000-0004⟧ and ⟦378282246310005⟧"),
    (Kind::Card, "3 ⟦6011000990139424⟧"),
    (Kind::Card, "⟦4222222222222⟧, ⟦3782 822463 10005⟧"),
    (Kind::Iban, "Konto ⟦DE89 3704 0044 0532 0130 00⟧ bei"),
    (
        Kind::Iban,
        "⟦GB82WEST12345698765432⟧, ⟦FR14 2004 1010 0505 0001 3M02 606⟧",
    ),
    (
        Kind::Iban,
        "⟦NO93 8601 1117 947⟧ ⟦CH93 0076 2011 6238 5295 7⟧",
    ),
    (Kind::Iban, "IBAN:⟦AT611904300234573201⟧."),
    (Kind::Ip, "from ⟦203.0.113.42⟧:8080, not 127.0.0.1"),
    (Kind::Ip, "ssh root@⟦10.20.30.40⟧"),
    (
        Kind::Ip,
        "the IP ⟦1.2.3.4⟧ and ⟦2001:db8:85a3::8a2e:370:7334⟧",
    ),
    (Kind::Secret, "key ⟦sk-ant-api03-Ab3dEf6hIj9kLmN0pQrS⟧"),
    (
        Kind::Secret,
        "⟦sk-proj-4fJ8sLq2Zx9Vb7Nm1Kd3⟧ ⟦AKIAIOSFODNN7EXAMPLE⟧",
    ),
    (Kind::Secret, "⟦ASIAY34FZKBOKMUTVV7A⟧"),
    (Kind::Secret, "⟦ghp_16C7e42F292c6912E7710c838347Ae178B4a⟧"),
    (Kind::Secret, "⟦gho_16C7e42F292c6912E7710c838347Ae178B4a⟧"),
    (
        Kind::Secret,
        "⟦github_pat_11ABCDEFG0aBcDeFgHiJkL_mNoPqRsTuVwXyZ⟧",
    ),
    (Kind::Secret, "⟦xoxb-123456789012-abcdefABCDEF⟧"),
    (Kind::Secret, "⟦AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY⟧"),
    (Kind::Secret, "⟦glpat-x9Kd82jfLs02mPqR7tUv⟧"),
    (Kind::Secret, "⟦npm_aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6⟧"),
    (
        Kind::Secret,
        "⟦eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P⟧",
    ),
    (
        Kind::Secret,
        "⟦-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----⟧\nend",
    ),
    (
        Kind::Secret,
        "⟦-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSj⟧\n\nThe end",
    ),
    (Kind::Secret, "password = ⟦hunter2!⟧"),
    (Kind::Secret, "DB_PASSWORD=\"⟦tr0ub4dor&3⟧\""),
    (Kind::Secret, "Das Passwort lautet ⟦Sommer2024!⟧"),
    (Kind::Secret, "the password is ⟦blue-Horse-77⟧."),
    (Kind::Secret, "{\"api_key\": \"⟦9f8e7d6c5b4a39281706⟧\"}"),
    (Kind::Secret, "token: ⟦q7Zt-93kLmP2xw⟧"),
    (Kind::Secret, "postgres://app:⟦s3cr3t@db.example.org⟧/x"),
    (Kind::Secret, "api_key = \"⟦EXAMPLE-q7Zt2Lm9Xc4Vb8Nn1Kp6⟧\""),
    (Kind::Ssn, "SSN ⟦536-90-4399⟧ on file"),
    (Kind::Ssn, "his social security number is ⟦536 90 4399⟧"),
    (Kind::Itin, "ITIN ⟦912-70-1234⟧"),
    (Kind::Nhs, "NHS number ⟦943 476 5919⟧, GP"),
    (Kind::Nino, "NINO ⟦AB 12 34 56 C⟧ and ⟦JG103759A⟧"),
    (Kind::Nif, "DNI ⟦12345678Z⟧, NIE ⟦X1234567L⟧, ⟦12345678-Z⟧"),
    (Kind::FiscalCode, "codice fiscale ⟦RSSMRA85T10A562S⟧."),
    (Kind::SteuerId, "Steuer-ID ⟦86 095 742 719⟧ oder IdNr ⟦86095742719⟧"),
    (Kind::Pesel, "PESEL: ⟦44051401359⟧"),
    (Kind::Aadhaar, "Aadhaar ⟦2341 2341 2346⟧"),
    (Kind::Tfn, "her TFN is ⟦123 456 782⟧"),
    (Kind::Abn, "ABN ⟦51 824 753 556⟧"),
    (Kind::Nric, "NRIC ⟦S1234567D⟧"),
    (Kind::Passport, "passport no. ⟦C01X00T47⟧, US passport ⟦340020013⟧"),
    (Kind::BirthDate, "born on ⟦12 March 1990⟧; DOB: ⟦1990-03-12⟧"),
    (Kind::BirthDate, "was born ⟦March 12, 1990⟧ in Kiel, geb. am ⟦3.4.1971⟧"),
    (Kind::Crypto, "to ⟦1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa⟧ or ⟦bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4⟧"),
    (Kind::Crypto, "⟦0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed⟧"),
    (Kind::Mac, "MAC ⟦00:1a:2b:3c:4d:5e⟧ and ⟦00-1A-2B-3C-4D-5E⟧"),
    (Kind::Secret, "Authorization: Bearer ⟦q7Zt93kLmP2xwVb81⟧"),
    (Kind::Secret, "redis://:⟦t0psecr3t⟧@cache:6379"),
];

const LOOKALIKES: &[&str] = &[
    "version 10.2.3.4, v1.2.3.4, build 10.0.19041.1, release 2.14.3",
    "see section 3.1.4.2 and § 12.4.1.1",
    "3.1.4.2 Scope of the agreement",
    "netmask 255.255.255.0, loopback 127.0.0.1, any 0.0.0.0",
    "on 2024-05-12, 12.05.2024, 05/12/2024, 2024/05/12 14:30:00",
    "von 01.02.2024 bis 28.02.2024, 08:00-16:30",
    "order 302-4418213-9920117, Order no. 0812-334455",
    "Bestellnummer 0815-4711001, Auftrag 030 1234567",
    "invoice 2024-000815, Rechnung RE-2024-00123456",
    "Kundennummer 0049123456, Vorgang 0711 445566",
    "ORD-4539148803436467",
    "card-shaped 4111 1111 1111 1112 fails its check",
    "IBAN-shaped DE89 3704 0044 0532 0130 01 fails its check",
    "commit d81a74c578bb3a0c1cd4231f0a9e8d7c6b5a4938",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "uuid 3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "git@github.com:example/handbook.git",
    "lodash@4.17.21 and @types/node and logo@2x.png",
    "password: required, at least 12 characters",
    "api_key = \"your-api-key-here\"",
    "api_key = os.environ['API_KEY'] and token = get_token(32)",
    "token: string; secret: Kubernetes-Secret",
    "Password is case-sensitive. Das Passwort ist geheim.",
    "max_tokens = 4096, secret = ${SECRET_FROM_VAULT_2}",
    "task-management-for-everyone and sk-learn-style-estimators-rule",
    "ISBN 978-3-16-148410-0, ISSN 2049-3630",
    "1 000 000 000 euros, 1,234,567.89, 100000000",
    "at 12:34:56, MAC 00:1a:2b:3c:4d:5e, std::fs::read",
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0B\n-----END PUBLIC KEY-----",
    "Inventarnummer 0401-2233445, Raum 0.12.3",
    "phone calls are logged since 2024-05-12",
    "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb, bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t5",
    "0x5aaeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    "SSN 000-12-3456, 666-12-3456, 536-00-4399, ITIN 912-10-1234",
    "order 536-90-4399, NHS 943 476 5918, 9434765918",
    "AB 12 34 56 E, BG123456A, 12345678A, X1234567A, S1234567A",
    "PESEL 44051401358, TFN 123 456 781, ABN 51 824 753 557",
    "Aadhaar 2341 2341 2345, 86 095 742 718",
    "signed on 12 March 1990, the passport office in Room 12",
    "postgres://user:password@localhost/db, https://x:${PASS}@h",
    "<EMAIL> <PHONE> <CARD> <IBAN> <IP> <SECRET> password = <SECRET>",
];

fn plain(marked: &str) -> (String, Vec<(usize, usize)>) {
    let (mut text, mut spans, mut start) = (String::new(), Vec::new(), 0);
    for c in marked.chars() {
        match c {
            '⟦' => start = text.len(),
            '⟧' => spans.push((start, text.len())),
            c => text.push(c),
        }
    }
    (text, spans)
}

/// Each head is in the body of the one before; a walk from each would take hours.
#[test]
fn a_body_of_heads_is_walked_once() {
    let text = "SG.".repeat(1_000_000);
    let _ = Scanner::new(Kinds::ALL).find(&text);
}

#[test]
fn every_plant_is_found_exactly() {
    for (kind, marked) in PLANTS {
        let (text, spans) = plain(marked);
        let found = Scanner::new(Kinds::ALL).find(&text);
        let got: Vec<_> = found.iter().map(|f| (f.start, f.end)).collect();
        assert_eq!(got, spans, "{text}: {found:?}");
        assert!(found.iter().all(|f| f.kind == *kind), "{text}: {found:?}");
    }
}

#[test]
fn no_lookalike_is_touched() {
    for text in LOOKALIKES {
        assert_eq!(&redact(text).0, text, "{:?}", pii(text));
        let kinds = Kinds::ALL.without(Kind::Mac);
        assert_eq!(Scanner::new(kinds).find(text), [], "{text}");
    }
}

#[test]
fn redaction_counts_by_kind() {
    let (text, counts) = redact("a@b.org, c@d.org: 4111111111111111");
    assert_eq!(text, "<EMAIL>, <EMAIL>: <CARD>");
    assert_eq!(counts, BTreeMap::from([(Kind::Card, 1), (Kind::Email, 2)]));
}

#[test]
fn languages() {
    let german = "Die Reisekosten werden innerhalb von vier Wochen nach der Reise erstattet.";
    let english = "Travel expenses are paid back within four weeks after the journey ends.";
    assert_eq!(language(german).unwrap().0, "de");
    assert_eq!(language(english).unwrap().0, "en");
    assert_eq!(language("Hallo Welt"), None);
    assert_eq!(language("12345 67890 !!!"), None);
}

/// Text dense in the characters that findings are made of.
fn dense() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        "[0-9]{1,5}",
        "[ .:/@+()=\"'<>_-]{1,2}",
        "[a-zA-Zäß]{1,4}",
        proptest::sample::select(
            PLANTS
                .iter()
                .map(|p| plain(p.1).0)
                .chain(LOOKALIKES.iter().map(|s| (*s).to_owned()))
                .chain(
                    [
                        "password=",
                        "<EMAIL>",
                        "sk-",
                        "://",
                        "\n",
                        "-----BEGIN PRIVATE KEY-----",
                        "Tel. "
                    ]
                    .map(str::to_owned)
                )
                .collect::<Vec<_>>()
        ),
    ];
    proptest::collection::vec(pieces, 0..24).prop_map(|p| p.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn redaction_is_idempotent_and_findings_are_disjoint(text in dense()) {
        let found = pii(&text);
        for pair in found.windows(2) {
            prop_assert!(pair[0].end <= pair[1].start);
        }
        for f in &found {
            prop_assert!(!text[f.start..f.end].is_empty());
        }
        let (once, _) = redact(&text);
        let (twice, counts) = redact(&once);
        prop_assert_eq!(&once, &twice);
        prop_assert!(counts.is_empty());
    }

    #[test]
    fn any_text_is_survived(text: String) {
        let once = redact(&text).0;
        prop_assert_eq!(redact(&once).0, once);
        language(&text);
    }

    /// The parsers by hand find what the plain patterns do.
    #[test]
    fn the_scanner_finds_what_the_patterns_do(text in dense()) {
        for kinds in [Kinds::ALL, Kinds::CORE] {
            prop_assert_eq!(Scanner::new(kinds).find(&text), reference::find(&text, kinds));
        }
    }

    /// What is settled stays as it is, whatever follows.
    #[test]
    fn the_settled_prefix_is_final(text in dense(), cut in 0.0..1.0f64) {
        let cut = text.floor_char_boundary((text.len() as f64 * cut) as usize);
        let scanner = Scanner::new(Kinds::ALL);
        let (head, whole) = (scanner.find(&text[..cut]), scanner.find(&text));
        let settled = scanner.settled(&text[..cut]);
        prop_assert!(cut - settled <= MAX_UNSETTLED);
        for f in head.iter().chain(&whole) {
            prop_assert!(f.end <= settled || f.start >= settled, "{settled} {f:?} {text:?}");
        }
        let ended = |found: &[Finding]| -> Vec<Finding> {
            found.iter().copied().filter(|f| f.end <= settled).collect()
        };
        prop_assert_eq!(ended(&head), ended(&whole), "{} of {:?}", settled, &text[..cut]);
    }

    /// However a text is cut, its pieces give what the whole does.
    #[test]
    fn a_stream_finds_what_the_whole_has(text in dense(), cuts in proptest::collection::vec(0.0..1.0f64, 0..12)) {
        let mut cuts: Vec<usize> = cuts.iter().map(|c| (text.len() as f64 * c) as usize).collect();
        cuts.sort_unstable();
        cuts.push(text.len());
        let mut stream = Stream::new(Scanner::new(Kinds::ALL));
        let (mut parts, mut at) = (Vec::new(), 0);
        for cut in cuts {
            let cut = text.floor_char_boundary(cut);
            parts.push(stream.push(&text[at..cut]));
            at = cut;
        }
        parts.push(stream.finish());
        let (mut said, mut found) = (String::new(), Vec::new());
        for part in parts {
            let base = said.len();
            found.extend(part.findings.iter().map(|f| Finding {
                start: f.start + base,
                end: f.end + base,
                ..*f
            }));
            said += &part.text;
        }
        prop_assert_eq!(&said, &text);
        prop_assert_eq!(found, Scanner::new(Kinds::ALL).find(&text));
    }
}
