//! Where a model's bytes come from: how much of its files is cached, how fast cache and disk are.

use std::borrow::Cow;
use std::sync::Arc;

use anyhow::Context;
use forebay::Bytes;
use forebay::measure::{self, DiskError, Rate};
use forebay::store::{Checkpoint, MappedFile, SourceFile};
use serde_json::{Value, json};

use super::seconds;

/// A model's files before the first pass.
pub(super) struct Storage {
    /// The largest file, on which rates are measured.
    file: Arc<SourceFile>,
    bytes: Bytes,
    /// `None` where the kernel does not tell.
    cached: Option<Bytes>,
    /// Or why there is none.
    disk: Result<Rate, String>,
    threads: usize,
}

impl Storage {
    pub(super) fn look_at(checkpoint: &Checkpoint, threads: usize) -> anyhow::Result<Self> {
        let files = checkpoint.files();
        let largest = files.iter().max_by_key(|file| file.len());
        let largest = largest.with_context(|| format!("{} names no files", checkpoint.path().display()))?;
        // Before the disk is read from, whatever that may bring into the cache.
        let cached: Option<Vec<Bytes>> =
            files.iter().map(|file| MappedFile::map(file)?.cached()).collect::<Result<_, _>>()?;
        let disk = match measure::disk(largest, threads) {
            Ok(rate) => Ok(rate),
            Err(DiskError::Store(error)) => return Err(error.into()),
            Err(reason) => Err(reason.to_string()),
        };
        Ok(Storage {
            file: Arc::clone(largest),
            bytes: files.iter().map(|file| file.len()).sum(),
            cached: cached.map(|cached| cached.into_iter().sum()),
            disk,
            threads,
        })
    }

    /// Reads into the page cache what is not there, so not before the first pass.
    pub(super) fn page_cache(&self) -> anyhow::Result<Rate> {
        Ok(measure::page_cache(&self.file, self.threads)?)
    }

    pub(super) fn describe_cached(&self) -> String {
        match self.cached {
            None => "the page cache is not told".to_owned(),
            Some(cached) => {
                let share = cached.get() as f64 / self.bytes.get().max(1) as f64;
                format!("{:.0}% in the page cache", share * 100.0)
            }
        }
    }

    pub(super) fn describe_disk(&self) -> String {
        match &self.disk {
            Ok(rate) => {
                let missing = self.cached.map(|cached| self.bytes.saturating_sub(cached));
                let first = match missing.filter(|missing| *missing > Bytes::ZERO) {
                    None => String::new(),
                    Some(missing) => {
                        let time = seconds(rate.time_for(missing));
                        format!("; the first pass reads {missing} from it, which takes {time} at this rate")
                    }
                };
                let (bytes, name, threads) = (rate.bytes, self.name(), self.threads);
                format!("{rate:>10}  {bytes} of {name}, past the page cache, by {threads} threads{first}")
            }
            Err(reason) => format!("{:>10}  {reason}", "-"),
        }
    }

    pub(super) fn describe_page_cache(&self, rate: &Rate) -> String {
        format!("{rate:>10}  {} into memory by {} threads, after the passes", self.name(), self.threads)
    }

    fn name(&self) -> Cow<'_, str> {
        self.file.path().file_name().unwrap_or_default().to_string_lossy()
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "bytes": self.bytes.get(),
            "cached_bytes_at_start": self.cached.map(Bytes::get),
            "measured_on": self.file.path().to_string_lossy(),
            "disk": match &self.disk {
                Ok(rate) => rate_to_json(rate),
                Err(reason) => json!({ "bytes_per_s": null, "reason": reason }),
            },
        })
    }
}

pub(super) fn rate_to_json(rate: &Rate) -> Value {
    json!({
        "bytes_per_s": rate.bytes_per_s(),
        "measured_bytes": rate.bytes.get(),
        "measured_seconds": rate.time.as_secs_f64(),
    })
}
