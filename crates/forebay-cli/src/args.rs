//! What can be given on the command line.

use std::path::PathBuf;

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
  forebay run model/ --budget 1GiB --passes 3 --device cuda:0

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
    /// Use every tensor of a checkpoint in order, pass after pass, and time it.
    ///
    /// Nothing is computed: the time is what Forebay needs to bring the weights to the device. The first pass also
    /// reads the file into the page cache where it is not there.
    Run(RunArgs),
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
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `forebay run`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  forebay run model.safetensors --budget 1GiB
  forebay run model/ --budget 8GiB --passes 5 --device cuda:0
  forebay run model.safetensors --json > passes.json")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// How often every tensor is used.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) passes: u32,
    /// Where to: `host`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "host")]
    pub(crate) device: DeviceId,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A model and how it is laid out.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// A `.safetensors` file, an `.safetensors.index.json`, or a folder with one of them.
    pub(crate) path: PathBuf,
    /// Device memory for weights, such as 8GiB or 500MB [default: a quarter of what the model takes].
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) budget: Option<Bytes>,
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

#[cfg(test)]
mod tests {
    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        super::Cli::command().debug_assert();
    }
}
