//! How long a step would take with other sizes of device memory.

use std::io::{self, Write};
use std::time::Duration;

use forebay::Bytes;
use forebay::measure::Rate;
use forebay::plan::Plan;
use serde_json::{Value, json};

use super::passes::{Kind, Pass};
use super::seconds;

/// Memory of graphics cards, in GiB.
const CARDS: [u64; 13] = [2, 4, 6, 8, 12, 16, 24, 32, 48, 80, 96, 141, 192];

/// So many sizes are of interest.
const ROWS: usize = 8;

/// Blocks of the longest bar.
const WIDTH: usize = 24;

/// One model's steps, by the memory its weights may take.
pub(super) struct Prediction {
    /// What streamed bytes are expected to move at: as in the passes, but no faster than the link.
    rate: Rate,
    /// Whether `rate` is that of the steps, or else of the first pass, as nothing was copied after it.
    from_steps: bool,
    link: Rate,
    compute: Duration,
    rows: Vec<Row>,
}

struct Row {
    memory: Bytes,
    resident: Bytes,
    streamed: Bytes,
    /// Predicted.
    step: Duration,
    /// At the rate of the link.
    limit: Duration,
    /// How long a step did take, for the size that was tried.
    measured: Option<Duration>,
}

impl Prediction {
    pub(super) fn new(plan: &Plan, tried: Bytes, passes: &[Pass], link: Rate, compute: Duration) -> Self {
        let (steps, of_steps) = together(passes, |kind| matches!(kind, Kind::Step(_)));
        let from_steps = of_steps.bytes > Bytes::ZERO;
        let achieved = if from_steps { of_steps } else { together(passes, |kind| kind == Kind::First).1 };
        let is_slower = achieved.bytes > Bytes::ZERO && achieved.bytes_per_s() < link.bytes_per_s();
        let rate = if is_slower { achieved } else { link };
        let row = |memory| {
            let residency = plan.within(memory);
            Row {
                memory,
                resident: residency.resident,
                streamed: residency.streamed,
                step: rate.time_for(residency.streamed).max(compute),
                limit: link.time_for(residency.streamed).max(compute),
                measured: (memory == tried).then(|| of_steps.time / steps.max(1)),
            }
        };
        let rows = sizes(plan, tried).into_iter().map(row).collect();
        Prediction { rate, from_steps, link, compute, rows }
    }

    pub(super) fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{:>10}  {:>10}  {:>10}  {:>9}  {:>9}  {:>9}",
            "memory", "resident", "streamed", "a step", "limit", "measured"
        )?;
        let longest = self.rows.iter().map(|row| row.step).max().unwrap_or_default();
        for row in &self.rows {
            let line = format!(
                "{:>10}  {:>10}  {:>10}  {:>9}  {:>9}  {:>9}  {}",
                row.memory.to_string(),
                row.resident.to_string(),
                row.streamed.to_string(),
                seconds(row.step),
                seconds(row.limit),
                row.measured.map(seconds).unwrap_or_default(),
                bar(row.step, longest),
            );
            writeln!(out, "{}", line.trim_end())?;
        }
        let whose = if self.from_steps { "steps" } else { "first pass, reads from disk included" };
        let compute = match self.compute {
            Duration::ZERO => String::new(),
            compute => format!(", or the {} of computing where that is longer", seconds(compute)),
        };
        writeln!(out, "memory    what the weights may take; activations need theirs beside it")?;
        writeln!(out, "a step    predicted: what is streamed, at the {} of the {whose}{compute}", self.rate)?;
        writeln!(out, "limit     the same at the {} of the link", self.link)?;
        writeln!(out, "measured  the mean of the steps above, which compute nothing")
    }

    pub(super) fn to_json(&self) -> Value {
        let rows: Vec<_> = self.rows.iter().map(Row::to_json).collect();
        json!({
            "assumed_bytes_per_s": self.rate.bytes_per_s(),
            "assumed_from": if self.from_steps { "steps" } else { "first pass" },
            "sizes": rows,
        })
    }
}

impl Row {
    fn to_json(&self) -> Value {
        json!({
            "memory_bytes": self.memory.get(),
            "resident_bytes": self.resident.get(),
            "streamed_bytes_a_step": self.streamed.get(),
            "predicted_seconds_a_step": self.step.as_secs_f64(),
            "limit_seconds_a_step": self.limit.as_secs_f64(),
            "measured_seconds_a_step": self.measured.map(|time| time.as_secs_f64()),
        })
    }
}

/// How many passes are of a kind, and their rate together.
fn together(passes: &[Pass], of_kind: impl Fn(Kind) -> bool) -> (u32, Rate) {
    let mut rate = Rate { bytes: Bytes::ZERO, time: Duration::ZERO };
    let mut count = 0;
    for pass in passes.iter().filter(|pass| of_kind(pass.kind)) {
        rate.bytes += pass.copied;
        rate.time += pass.time;
        count += 1;
    }
    (count, rate)
}

/// The size that was tried, and those of cards from what works up to the first that holds everything. For a model that
/// any card holds, smaller ones.
fn sizes(plan: &Plan, tried: Bytes) -> Vec<Bytes> {
    let small = (2..=10).map(|power| Bytes::mib(1 << power));
    let ladder: Vec<_> = small.chain(CARDS.map(Bytes::gib)).collect();
    let everything = plan.page_size() * u64::from(plan.pages());
    let first = ladder.partition_point(|size| *size < plan.least_budget());
    let last = (ladder.partition_point(|size| *size < everything) + 1).clamp(first, ladder.len());
    let mut sizes = ladder[first.max(last.saturating_sub(ROWS))..last].to_vec();
    if let Err(place) = sizes.binary_search(&tried) {
        sizes.insert(place, tried);
    }
    sizes
}

fn bar(time: Duration, longest: Duration) -> String {
    let share = time.as_secs_f64() / longest.as_secs_f64().max(1e-9);
    "█".repeat((share * WIDTH as f64).round() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use forebay::store::{Memory, Source};
    use forebay::{LayoutOptions, WeightKind, WeightSpec};

    /// A model of weights of 32 MiB, all of them the same memory.
    fn plan(count: usize) -> Plan {
        let memory: Arc<dyn Memory> = Arc::new(vec![0; 32 << 20]);
        let weights = (0..count).map(|i| WeightSpec {
            name: format!("w{i}"),
            source: Source::memory(Arc::clone(&memory)),
            kind: WeightKind::Whole,
        });
        Plan::new(weights.collect(), LayoutOptions::default()).unwrap()
    }

    #[test]
    fn sizes_go_from_what_works_to_the_first_that_holds_everything() {
        let gib = |sizes: &[u64]| sizes.iter().map(|size| Bytes::gib(*size)).collect::<Vec<_>>();
        assert_eq!(sizes(&plan(800), Bytes::gib(8)), gib(&[2, 4, 6, 8, 12, 16, 24, 32]));
        assert_eq!(sizes(&plan(800), Bytes::gib(7))[2..4], gib(&[6, 7]));
        let small = sizes(&plan(4), Bytes::mib(96));
        assert_eq!(small, [32, 64, 96, 128].map(Bytes::mib));
        assert_eq!(sizes(&plan(8000), Bytes::gib(8)).last(), Some(&Bytes::gib(192)));
    }

    #[test]
    fn a_step_takes_as_long_as_the_longer_of_copying_and_computing() {
        let plan = plan(800);
        let link = Rate { bytes: Bytes::gib(50), time: Duration::from_secs(1) };
        let compute = Duration::from_millis(300);
        let prediction = Prediction::new(&plan, Bytes::gib(8), &[], link, compute);
        let of = |memory| prediction.rows.iter().find(|row| row.memory == memory).unwrap();
        assert_eq!(of(Bytes::gib(2)).step, link.time_for(of(Bytes::gib(2)).streamed));
        assert!(of(Bytes::gib(2)).step > compute);
        assert_eq!((of(Bytes::gib(24)).step, of(Bytes::gib(32)).streamed), (compute, Bytes::ZERO));
        assert!(prediction.rows.is_sorted_by(|a, b| a.step >= b.step && a.streamed >= b.streamed));
    }
}
