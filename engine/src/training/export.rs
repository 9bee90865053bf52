//! A trained model as a HuggingFace folder: adapters merged, memory beside the weights, tokenizer copied.
//! Knows no optimizer; the engine and `transformers` read what is written here.

use super::base::Base;
use super::config::TrainingConfig;
use super::model::TrainModel;
use super::parameters::is_adapter;
use crate::error::{Error, ErrorKind, Result};
use crate::parallel::RATES;
use candle_core::Tensor;
use std::collections::HashMap;
use std::path::Path;

/// The name of `tensor`'s adapter: layers.3.lora.q for model.layers.3.self_attn.q_proj.weight.
fn adapter_of(tensor: &str) -> Option<String> {
    let rest = tensor.strip_prefix("model.layers.")?.strip_suffix("_proj.weight")?;
    let (layer, place) = rest.split_once('.')?;
    let (_, part) = place.split_once('.')?;
    Some(format!("layers.{layer}.lora.{part}"))
}

/// Writes config.json, model.safetensors, mka.safetensors and the tokenizer's files; what was there is replaced.
///
/// Every process of a tensor group gives its parts; the first of them writes.
///
/// # Errors
/// `Storage` if a file cannot be written.
pub(super) fn write(
    base: &Base,
    model: &TrainModel,
    config: &TrainingConfig,
    folder: &Path,
) -> Result<()> {
    let tensors = model.whole()?;
    if model.group.index() > 0 {
        return Ok(());
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::io("make model folder", folder, e))?;
    let scale = config.lora.alpha / config.lora.rank as f64;
    let (mut weights, mut memory) = (HashMap::new(), HashMap::new());
    for (name, tensor) in &tensors {
        if name == RATES || is_adapter(name) {
            continue;
        }
        let mut value = tensor.clone();
        if name.starts_with("layers.") {
            memory.insert(name.clone(), value);
            continue;
        }
        if let Some(adapter) = adapter_of(name) {
            let part = |which: &str| format!("{adapter}.{which}");
            if let (Some(a), Some(b)) = (tensors.get(&part("a")), tensors.get(&part("b"))) {
                value = (value + (b.matmul(a)? * scale)?)?;
            }
        }
        weights.insert(name.clone(), value);
    }
    // transformers looks for this mark before it reads.
    let mark = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    save(&folder.join("model.safetensors"), &weights, mark)?;
    let beside = folder.join("mka.safetensors");
    match memory.is_empty() {
        false => save(&beside, &memory, HashMap::new())?,
        true if beside.exists() => {
            std::fs::remove_file(&beside)
                .map_err(|e| Error::io("remove memory file", &beside, e))?;
        }
        true => {}
    }
    let path = folder.join("config.json");
    std::fs::write(&path, base.config_json(config, &model.rates()?)?)
        .map_err(|e| Error::io("write model file", &path, e))?;
    base.write_companions(folder)
}

fn save(
    path: &Path,
    tensors: &HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|source| {
        Error::new(ErrorKind::Storage, format!("write {}: {source}", path.display()))
            .with_source(source)
    })
}
