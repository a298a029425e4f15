//! How much device memory the weights may take.

use anyhow::ensure;
use forebay::device::{Device, DeviceId, cuda};
use forebay::{Budget, Bytes, EngineConfig};
use serde_json::{Value, json};

use crate::checkpoint::{Model, least_budget, quarter};

/// The device's memory, and the part of it that is used.
pub(super) struct Free {
    pub(super) budget: Bytes,
    chosen: Chosen,
    /// What the device had free at the start.
    available: Bytes,
    pages: Bytes,
}

/// Why the budget is what it is.
enum Chosen {
    Asked,
    /// What is free, less the usual headroom.
    Available,
    /// Everything would fit, which leaves nothing to stream.
    Quarter,
}

/// The first GPU; without one, the host.
pub(super) fn default_device() -> DeviceId {
    match cuda::device_count() {
        Ok(count) if count > 0 => DeviceId::Cuda(0),
        _ => DeviceId::Host,
    }
}

impl Free {
    pub(super) fn choose(
        asked: Option<Bytes>,
        models: &[Model],
        device: &dyn Device,
    ) -> anyhow::Result<Self> {
        let available = device.memory()?.free;
        let pages = models.iter().map(Model::pages).sum();
        let headroom = match EngineConfig::default().budget {
            Budget::Headroom(headroom) => headroom,
            Budget::Fixed(_) => Bytes::ZERO,
        };
        let usual = available.saturating_sub(headroom);
        let (budget, chosen) = match asked {
            Some(asked) => (asked, Chosen::Asked),
            None if usual < pages => (usual, Chosen::Available),
            None => (quarter(models), Chosen::Quarter),
        };
        let least = least_budget(models).max(device.granularity());
        let whose = match chosen {
            Chosen::Asked => "--free".to_owned(),
            _ => format!("what {} has free, but for {headroom},", device.id()),
        };
        ensure!(
            budget >= least,
            "{whose} is too little for one operation at a time, which takes {least}, {} more: {budget}",
            least - budget
        );
        Ok(Free { budget, chosen, available, pages })
    }

    /// In words, after the device's name.
    pub(super) fn describe(&self) -> String {
        let Free { budget, available, pages, .. } = self;
        // The host device has no limit.
        let of = match *available {
            Bytes::MAX => String::new(),
            available if available < *budget => format!(", though {available} are free,"),
            available => format!(" of {available} free"),
        };
        let why = match self.chosen {
            Chosen::Quarter => format!("; all of it would fit in {pages}, so a quarter shows how it streams"),
            _ if budget.min(available) >= pages => "; everything fits".to_owned(),
            _ => String::new(),
        };
        format!("{budget}{of} for weights{why}")
    }

    pub(super) fn to_json(&self) -> Value {
        let chosen = match self.chosen {
            Chosen::Asked => "argument",
            Chosen::Available => "free memory less headroom",
            Chosen::Quarter => "quarter of the models",
        };
        json!({
            "bytes": self.budget.get(),
            "chosen_by": chosen,
            "available_bytes": (self.available != Bytes::MAX).then_some(self.available.get()),
            "everything_bytes": self.pages.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::LayoutArgs;
    use forebay::device::host::{HostConfig, HostDevice};
    use safetensors::{Dtype, tensor::TensorView};

    #[test]
    fn the_default_is_what_is_free_unless_everything_fits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let bytes = vec![0; 4 << 20];
        let weight = |i| (format!("w{i}"), TensorView::new(Dtype::U8, vec![4 << 20], &bytes).unwrap());
        safetensors::serialize_to_file((0..8).map(weight), None, &path).unwrap();
        let models = [Model::open(&path, &LayoutArgs { page_size: None, tables: Vec::new() }).unwrap()];
        let choose = |asked, capacity| {
            let device = HostDevice::new(HostConfig { capacity, ..HostConfig::default() }).unwrap();
            Free::choose(asked, &models, &device)
        };
        let described = |asked, capacity| choose(asked, capacity).unwrap().describe();
        assert_eq!(described(None, Bytes::mib(528)), "16 MiB of 528 MiB free for weights");
        let fits = described(None, Bytes::gib(1));
        assert_eq!(
            fits,
            "8 MiB of 1 GiB free for weights; all of it would fit in 32 MiB, so a quarter shows how it streams"
        );
        assert_eq!(
            described(Some(Bytes::mib(64)), Bytes::mib(20)),
            "64 MiB, though 20 MiB are free, for weights"
        );
        assert_eq!(described(Some(Bytes::mib(64)), Bytes::MAX), "64 MiB for weights; everything fits");
        let error = choose(None, Bytes::mib(514)).err().unwrap().to_string();
        let expected = "what host has free, but for 512 MiB, is too little for one operation at a time, which takes 4 MiB, \
                        2 MiB more: 2 MiB";
        assert_eq!(error, expected);
    }
}
