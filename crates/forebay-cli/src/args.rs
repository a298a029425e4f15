//! What can be given on the command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use forebay::Bytes;
use forebay::device::DeviceId;

/// Dynamic VRAM for model weights: run models larger than the GPU's free memory.
#[derive(Parser)]
#[command(name = "forebay", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  forebay doctor
  forebay inspect model.safetensors --budget 8GiB
  forebay bench model/ --free 8GiB --device cuda:0

Exit codes: 0 success, 1 failure, 2 wrong usage.";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Find out what works on this machine, by trying it: devices, memory, limits.
    ///
    /// Each failure is shown with its remedy. Ends with code 1 where no device works.
    Doctor(DoctorArgs),
    /// Show what is in a checkpoint, and what of it would stay in a budget of device memory.
    ///
    /// Reads headers only. Tensors whose names differ in numbers alone are shown as one line. The picture has a block
    /// for each page, in the order of use: resident pages stay between passes, streamed ones are copied in each pass.
    Inspect(InspectArgs),
    /// Stream your own models on your own device, and hold the result against what the machine can do.
    ///
    /// Measures the link to the device, the disk and the page cache. Then uses every tensor of each model in order, pass
    /// after pass, and predicts how long a step takes with more or less device memory.
    ///
    /// The passes compute nothing, so their limit is the time in which the link could copy as much. The first pass brings
    /// every byte to the device, and the file into the page cache where it is not there yet; the steps after it copy
    /// what did not stay. With several models each has its first pass and its steps in turn, as in a pipeline; then each
    /// has one more pass, which shows what was left of it.
    ///
    /// Nothing is written, and nothing is evicted from the page cache.
    Bench(BenchArgs),
}

/// Arguments of `forebay doctor`.
#[derive(Args)]
#[command(after_help = "Examples:\n  forebay doctor\n  forebay doctor --json")]
pub(crate) struct DoctorArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `forebay inspect`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  forebay inspect model.safetensors
  forebay inspect model.safetensors.index.json --budget 8GiB
  forebay inspect model/ --budget 500MB --page-size 2MiB --json
  forebay inspect model.safetensors --table embeddings.word_embeddings.weight")]
pub(crate) struct InspectArgs {
    /// A `.safetensors` file, an `.safetensors.index.json`, or a folder with one of them.
    #[arg(value_name = "MODEL")]
    pub(crate) path: PathBuf,
    /// Device memory for weights, such as 8GiB or 500MB [default: a quarter of what the model takes].
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) budget: Option<Bytes>,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `forebay bench`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  forebay bench model.safetensors --free 8GiB
  forebay bench model/ --free 8GiB --steps 10 --compute 190 --device cuda:1
  forebay bench text_encoder/ transformer/ vae/ --free 12GiB
  forebay bench model.safetensors --json > bench.json")]
pub(crate) struct BenchArgs {
    /// Models to use in turn: a `.safetensors` file, an `.safetensors.index.json`, or a folder with one of them each.
    #[arg(value_name = "MODEL", required = true)]
    pub(crate) models: Vec<PathBuf>,
    /// Device memory that the weights may take, such as 8GiB or 500MB [default: what is free, but for 512MiB; where that
    /// is enough for everything, a quarter of what the models take].
    #[arg(long, value_name = "SIZE", visible_alias = "budget", allow_hyphen_values = true)]
    pub(crate) free: Option<Bytes>,
    /// Passes over each model after its first.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: u32,
    /// How long your model computes in a step, in milliseconds. Copying hides behind it, so a predicted step takes as long
    /// as the longer of the two.
    #[arg(long, value_name = "MS", default_value = "0", allow_hyphen_values = true, value_parser = milliseconds)]
    pub(crate) compute: Duration,
    /// Where to: `host`, `cuda` or `cuda:N` [default: the first GPU; without one, the host].
    #[arg(long)]
    pub(crate) device: Option<DeviceId>,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    /// Print one JSON object instead of tables. Names tell the units: bytes, seconds, bytes_per_s.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How a model is laid out.
#[derive(Args)]
pub(crate) struct LayoutArgs {
    /// Bytes a page, a power of two from 2MiB up [default: by the model's size, between 2MiB and 32MiB].
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = page_size)]
    pub(crate) page_size: Option<Bytes>,
    /// A tensor that is a table of which rows are looked up at their source, so that it need not fit. May be repeated.
    #[arg(long = "table", value_name = "TENSOR")]
    pub(crate) tables: Vec<String>,
}

fn page_size(text: &str) -> Result<Bytes, String> {
    let size: Bytes = text.parse().map_err(|error: forebay::policy::ParseBytesError| error.to_string())?;
    if size >= Bytes::mib(2) && size.get().is_power_of_two() {
        return Ok(size);
    }
    Err(format!("a page is a power of two of at least 2 MiB: {size}"))
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    let number: Option<f64> = text.parse().ok();
    let time = number.and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok());
    time.ok_or_else(|| format!("a time is a number of milliseconds from 0 up: {text:?}"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        super::Cli::command().debug_assert();
    }
}
