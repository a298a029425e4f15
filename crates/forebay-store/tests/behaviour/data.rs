//! Random bytes and files to test with.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Random numbers (SplitMix64) from a seed that a failing test shows, and that `FOREBAY_TEST_SEED` sets.
pub(crate) struct Random(u64);

impl Random {
    #[expect(clippy::print_stderr, reason = "the test harness shows it when the test fails")]
    pub(crate) fn new() -> Random {
        let set = std::env::var("FOREBAY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seed = set.unwrap_or(u64::from(now.subsec_nanos()) ^ now.as_secs() << 30);
        eprintln!("FOREBAY_TEST_SEED={seed}");
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// A tensor to write.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    pub(crate) fn random(random: &mut Random, name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
        let bits = shape.iter().product::<usize>() * dtype.bitsize();
        Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data: random.bytes(bits / 8) }
    }
}

/// Tensors of several element types, one of them empty and one a scalar.
pub(crate) fn tensors(random: &mut Random, prefix: &str) -> Vec<Tensor> {
    let mut tensor = |name: &str, dtype, shape: &[usize]| {
        Tensor::random(random, &format!("{prefix}.{name}"), dtype, shape)
    };
    vec![
        tensor("weight", Dtype::BF16, &[5, 7]),
        tensor("bias", Dtype::F32, &[3]),
        tensor("scale", Dtype::F8_E8M0, &[11]),
        tensor("packed", Dtype::F4, &[2, 9]),
        tensor("empty", Dtype::F16, &[0, 4]),
        tensor("scalar", Dtype::I64, &[]),
    ]
}

/// The bytes of a file with these tensors, written by the `safetensors` crate.
pub(crate) fn serialize(tensors: &[Tensor], metadata: Option<HashMap<String, String>>) -> Vec<u8> {
    let views = tensors.iter().map(|tensor| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data);
        (tensor.name.as_str(), view.expect("a consistent tensor"))
    });
    safetensors::serialize(views, metadata).expect("serialisable tensors")
}

/// The bytes of a file with this header, whatever it says.
pub(crate) fn with_header(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Writes `bytes` to `name` in `folder`, with a modification time well in the past.
pub(crate) fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).expect("a writable folder");
    let file = fs::File::options().write(true).open(&path).expect("a writable file");
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("a file whose time can be set");
    path
}

pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}
