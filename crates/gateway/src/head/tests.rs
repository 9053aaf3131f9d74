//! Heads on points with known labels.

use super::*;
use ashlar_core::Digest;

pub(crate) fn encoder(dimensions: usize) -> EncoderId {
    EncoderId { name: "points".into(), digest: Digest::of(b"points"), dimensions }
}

/// Uniform in 0..1, the same each time.
pub(crate) fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut z = seed;
    move || {
        z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (z >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// `n` points around `k` corners, `noise` of them with another's label.
fn corners(n: usize, k: usize, noise: f32) -> Examples {
    let mut random = numbers(7);
    let mut out = Examples::default();
    for i in 0..n {
        let at = i % k;
        let row = (0..k).map(|d| if d == at { 1.0 } else { 0.0 } + 0.6 * (random() - 0.5)).collect();
        let label = if random() < noise { (at + 1) % k } else { at };
        out.rows.push(row);
        out.targets.push((0..k).map(|d| f32::from(u8::from(d == label))).collect());
    }
    out
}

fn names(k: usize) -> Vec<String> {
    (0..k).map(|i| format!("l{i}")).collect()
}

#[test]
fn what_can_be_told_apart_is() {
    let head = Head::train(encoder(4), HeadKind::Softmax, names(4), &corners(200, 4, 0.0)).unwrap();
    assert_eq!((head.report.held_out, head.report.trained_on), (40, 160));
    assert!(head.report.accuracy > 0.99 && head.report.macro_f1 > 0.99, "{:?}", head.report);
    assert!(head.report.baseline < 0.5);
    let p = head.predict(&[0.0, 1.0, 0.0, 0.0]).unwrap();
    assert!(p[1] > 0.9 && (p.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{p:?}");
}

#[test]
fn what_is_chance_is_not_learnt_and_not_claimed() {
    let mut examples = corners(400, 4, 0.0);
    let mut random = numbers(3);
    for t in &mut examples.targets {
        let label = (random() * 4.0) as usize;
        *t = (0..4).map(|d| f32::from(u8::from(d == label))).collect();
    }
    let report = Head::train(encoder(4), HeadKind::Softmax, names(4), &examples).unwrap().report;
    assert!(report.accuracy < 0.45, "the held-out part was not seen: {report:?}");
    assert!(report.ece < 0.2, "and the head knows that it knows nothing: {report:?}");
}

#[test]
fn its_probabilities_are_frequencies() {
    // One label in five is wrong, so no one is surer than four in five.
    let head = Head::train(encoder(3), HeadKind::Softmax, names(3), &corners(1500, 3, 0.2)).unwrap();
    assert!((0.72..0.88).contains(&head.report.accuracy), "{:?}", head.report);
    assert!(head.report.ece < 0.08, "{:?}", head.report);
    let p = head.predict(&[1.0, 0.0, 0.0]).unwrap();
    assert!((0.7..0.92).contains(&p[0]), "{p:?}");
}

#[test]
fn labels_may_come_together() {
    let mut random = numbers(11);
    let mut examples = Examples::default();
    for _ in 0..400 {
        let row: Vec<f32> = (0..3).map(|_| 2.0 * random() - 1.0).collect();
        examples.targets.push(vec![f32::from(u8::from(row[0] > 0.0)), f32::from(u8::from(row[1] > 0.2))]);
        examples.rows.push(row);
    }
    let head = Head::train(encoder(3), HeadKind::Sigmoid, names(2), &examples).unwrap();
    assert!(head.report.macro_f1 > 0.93, "{:?}", head.report);
    let p = head.predict(&[0.9, 0.9, 0.0]).unwrap();
    assert!(p[0] > 0.9 && p[1] > 0.9, "both at once: {p:?}");
}

#[test]
fn the_same_examples_give_the_same_file_which_reads_back() {
    let examples = corners(100, 3, 0.1);
    let train = || Head::train(encoder(3), HeadKind::Softmax, names(3), &examples).unwrap();
    let (head, json) = (train(), train().to_json().unwrap());
    assert_eq!(head.to_json().unwrap(), json);
    assert_eq!(Head::from_json(json.as_bytes(), &encoder(3)).unwrap(), head);
    let other = EncoderId { digest: Digest::of(b"other"), ..encoder(3) };
    let e = Head::from_json(json.as_bytes(), &other).unwrap_err();
    assert!(matches!(e, HeadError::Encoder { .. }) && e.hint().is_some(), "{e}");
    for (from, to) in [
        ("ashlar-head/1", "ashlar-head/9"), ("\"labels\":[\"l0\",", "\"labels\":["), ("\"temperature\":", "\"temperature\":-"),
        ("\"bias\":[", "\"bias\":[1,"), ("\"dimensions\":3", "\"dimensions\":4"), ("\"kind\"", "\"kin\""),
    ] {
        assert!(json.contains(from), "{from}");
        assert!(Head::from_json(json.replace(from, to).as_bytes(), &encoder(3)).is_err(), "{to}");
    }
}

#[test]
fn the_same_text_is_on_one_side() {
    // Each text thrice: were copies split, the held-out part would be known by
    // heart though labels are random.
    let mut random = numbers(5);
    let mut examples = Examples::default();
    for _ in 0..60 {
        let row: Vec<f32> = (0..100).map(|_| random() - 0.5).collect();
        let label = usize::from(random() < 0.5);
        for _ in 0..3 {
            examples.rows.push(row.clone());
            examples.targets.push((0..2).map(|d| f32::from(u8::from(d == label))).collect());
        }
    }
    let report = Head::train(encoder(100), HeadKind::Softmax, names(2), &examples).unwrap().report;
    assert!(report.accuracy < 0.85 && report.held_out >= 36, "{report:?}");
}

#[test]
fn examples_that_do_not_do_are_named() {
    let train = |f: &dyn Fn(&mut Examples)| {
        let mut examples = corners(40, 2, 0.0);
        f(&mut examples);
        Head::train(encoder(2), HeadKind::Softmax, names(2), &examples).unwrap_err()
    };
    assert!(matches!(train(&|e| e.rows.truncate(5)), HeadError::Few { got: 5 }));
    assert!(matches!(train(&|e| e.rows[3] = vec![1.0]), HeadError::Example { index: 3, .. }));
    assert!(matches!(train(&|e| e.rows[4][0] = f32::NAN), HeadError::Example { index: 4, .. }));
    assert!(matches!(train(&|e| e.targets[5] = vec![1.0, 1.0]), HeadError::Example { index: 5, .. }));
    assert!(matches!(train(&|e| e.targets.iter_mut().for_each(|t| *t = vec![1.0, 0.0])), HeadError::Label { with: 40, .. }));
}

proptest::proptest! {
    #[test]
    fn any_file_is_read_or_refused(bytes: Vec<u8>) {
        let _ = Head::from_json(&bytes, &encoder(2));
    }

    #[test]
    fn probabilities_are_probabilities(row in proptest::collection::vec(-1e3f32..1e3, 3)) {
        static HEAD: std::sync::LazyLock<Head> = std::sync::LazyLock::new(|| {
            Head::train(encoder(3), HeadKind::Softmax, names(3), &corners(60, 3, 0.1)).unwrap()
        });
        let p = HEAD.predict(&row).unwrap();
        proptest::prop_assert!(p.iter().all(|p| (0.0..=1.0).contains(p)));
        proptest::prop_assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-4);
    }
}
