//! Runs passes over a checkpoint in a quarter of the memory that its weights need.
//!
//! ```text
//! cargo run --release -p forebay --example stream_checkpoint                                # a random one, on the host
//! cargo run --release -p forebay --example stream_checkpoint -- model.safetensors cuda:0
//! ```
//!
//! Each weight is acquired, copied back by the stream that uses it (in place of a kernel that computes with it) and
//! compared with the file.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use forebay::device::{self, Device, DeviceId, Event, PinnedBuffer, Stream};
use forebay::plan::Plan;
use forebay::store::{Checkpoint, Source};
use forebay::{Attachment, Budget, Bytes, Engine, EngineConfig, LayoutOptions, Use, WeightKind, WeightSpec};
use safetensors::{Dtype, tensor::TensorView};

const PASSES: usize = 3;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = tempfile::tempdir()?;
    let path = args.next().map_or_else(|| write_checkpoint(folder.path()), |path| Ok(PathBuf::from(path)))?;
    let device: DeviceId = args.next().as_deref().unwrap_or("host").parse()?;

    // What there is. Opening reads the header only.
    let checkpoint = Checkpoint::open(&path)?;
    let weights: Vec<WeightSpec> = checkpoint
        .tensors()
        .iter()
        .map(|tensor| WeightSpec {
            name: tensor.name.clone(),
            source: tensor.source(),
            kind: WeightKind::Whole,
        })
        .collect();

    // A quarter of it has to do, as long as any one weight fits.
    let options = LayoutOptions::default();
    let plan = Plan::new(weights.clone(), options)?;
    let quarter = plan.page_size() * u64::from(plan.pages()).div_ceil(4);
    let budget = quarter.max(plan.least_budget());
    println!("{} in {} pages of {}, budget {budget}", plan.weights(), plan.pages(), plan.page_size());

    // One engine a device, one attachment a model. The stream outlives the model.
    let device = device::open(device)?;
    let config = EngineConfig { budget: Budget::Fixed(budget), ..EngineConfig::default() };
    let engine = Engine::new(Arc::clone(&device), config)?;
    let mut consumer = Consumer::new(&device, &checkpoint)?;
    let model = engine.attach("model", weights, options)?;

    for pass in 1..=PASSES {
        let before = model.stats().filled;
        for weight in 0..checkpoint.tensors().len() {
            consumer.use_weight(&model, weight)?;
        }
        println!("pass {pass}: {} copied, every byte as in the file", model.stats().filled - before);
    }
    println!("\n{}", engine.stats());
    Ok(())
}

/// A stream that uses weights, and a buffer for what it read.
struct Consumer {
    device: Arc<dyn Device>,
    stream: Stream,
    done: Event,
    buffer: PinnedBuffer,
}

impl Consumer {
    fn new(device: &Arc<dyn Device>, checkpoint: &Checkpoint) -> device::Result<Self> {
        let largest = checkpoint.tensors().iter().map(|tensor| tensor.bytes).max().unwrap_or_default();
        Ok(Consumer {
            stream: Stream::new(Arc::clone(device))?,
            done: Event::new(Arc::clone(device))?,
            buffer: PinnedBuffer::new(Arc::clone(device), largest.max(Bytes::new(1)))?,
            device: Arc::clone(device),
        })
    }

    fn use_weight(&mut self, model: &Attachment, weight: usize) -> anyhow::Result<()> {
        let source = model.source(weight)?;
        let stream = self.stream.handle();
        {
            // From here on, work given to the stream finds the weight at its address...
            let _pinned = model.acquire(weight, Use::on(stream))?;
            let address = model.address(weight)?;
            // SAFETY: the weight is pinned and the buffer left alone until the copy has completed.
            unsafe { self.device.copy_to_host(self.buffer.as_ptr(), address, source.len(), stream) }?;
            // SAFETY: the stream is alive and of this device.
            unsafe { self.done.record(stream) }?;
            // ...up to here. The weight may leave once that work is done, which nobody has to wait for.
        }
        self.done.synchronize()?;
        // SAFETY: the only copy to the buffer has completed.
        compare(source, unsafe { self.buffer.slice(Bytes::ZERO, source.len()) })
    }
}

fn compare(source: &Source, found: &[u8]) -> anyhow::Result<()> {
    let mut expected = vec![0; found.len()];
    source.read_at(0, &mut expected)?;
    anyhow::ensure!(expected == found, "the device has other bytes than {source:?}");
    Ok(())
}

/// Writes 24 matrices of 3 MiB and their biases.
fn write_checkpoint(folder: &Path) -> anyhow::Result<PathBuf> {
    let (rows, columns) = (1024, 768);
    let matrix = random_bytes(4 * rows * columns);
    let mut tensors = Vec::new();
    for layer in 0..24 {
        let weight = TensorView::new(Dtype::F32, vec![rows, columns], &matrix)?;
        let bias = TensorView::new(Dtype::F32, vec![rows], &matrix[..4 * rows])?;
        tensors.push((format!("layers.{layer:02}.weight"), weight));
        tensors.push((format!("layers.{layer:02}.bias"), bias));
    }
    let path = folder.join("random.safetensors");
    safetensors::serialize_to_file(tensors, None, &path)?;
    Ok(path)
}

/// xorshift64* (S. Vigna, 2016).
fn random_bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(count).collect()
}
