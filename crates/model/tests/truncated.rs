//! A model file cut short at any moment: a typed error, or no difference at
//! all, never the end of the process.

mod common;

use common::file;
use ashlar_model::{Item, KvCache, Model, ModelError, Pool, Want, Workspace};
use std::{
    fs::{self, File, OpenOptions},
    sync::atomic::{AtomicBool, Ordering},
};

fn logits(model: &Model) -> Vec<u32> {
    let (mut cache, mut ws) = (KvCache::new(model.config(), 1), Workspace::default());
    let item = Item { tokens: &[504, 3575, 282, 4649, 314], start: 0, blocks: &[0], want: Want::Last };
    let out = model.forward(&[item], &mut cache, &mut ws).unwrap();
    out.row(0).iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_loaded_model_does_not_need_its_file() {
    let Some(path) = file() else { return };
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("model.gguf");
    fs::copy(path, &copy).unwrap();
    let model = Model::load_with(&copy, Pool::new(2)).unwrap();
    let before = logits(&model);
    OpenOptions::new().write(true).truncate(true).open(&copy).unwrap();
    assert_eq!(fs::metadata(&copy).unwrap().len(), 0);
    assert!(logits(&model) == before, "the weights were still in the file");
}

#[test]
fn a_short_file_is_a_typed_error() {
    let Some(path) = file() else { return };
    let bytes = fs::read(path).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let cut = dir.path().join("model.gguf");
    for len in [0, 3, 100, 4096, bytes.len() / 3, bytes.len() - 1] {
        fs::write(&cut, &bytes[..len]).unwrap();
        let e = Model::load_with(&cut, Pool::new(1)).unwrap_err();
        assert!(matches!(e, ModelError::Format(_)), "{len} bytes: {e}");
    }
}

/// One thread cuts the file short and fills it again while another loads it.
#[test]
fn a_file_cut_short_while_it_loads_does_not_end_the_process() {
    let Some(path) = file() else { return };
    let bytes = fs::read(path).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let shaky = dir.path().join("model.gguf");
    fs::write(&shaky, &bytes).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::options().write(true).open(&shaky).unwrap();
            for len in (0..bytes.len()).step_by(bytes.len() / 97).cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                file.set_len(len as u64).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(3));
                fs::write(&shaky, &bytes).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        let (mut whole, mut refused) = (0, 0);
        for _ in 0..12 {
            match Model::load_with(&shaky, Pool::new(1)) {
                Ok(_) => whole += 1,
                // Bytes of two moments: whatever the parser makes of them.
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
        eprintln!("{whole} loaded, {refused} refused");
    });
}
