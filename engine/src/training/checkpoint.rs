//! Where a run can go on: trained tensors, moments and step, written whole or not at all.
//! Knows no layer; what a name means is the model's matter.

use super::model::TrainModel;
use super::optimizer::AdamW;
use super::parameters::Parameter;
use crate::error::{Error, ErrorKind, Result};
use crate::parallel::{Placement, TensorGroup};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

const TRAINED: &str = "trained.safetensors";
const MOMENTS: &str = "moments.safetensors";
const STATE: &str = "state.json";

/// What a checkpoint says beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) version: u32,
    pub(super) step: u64,
    /// Fingerprint of the untouched model.
    pub(super) base: String,
    /// Fingerprint of the training text as tokens.
    pub(super) corpus: u64,
    /// What may not change within a run, as TOML.
    pub(super) settings: String,
    /// Processes, or groups of them that share a model, with data of their own: which sequences a step reads rests on it.
    /// 0 of a checkpoint from before it was written.
    #[serde(default)]
    pub(super) replicas: usize,
    /// Hashes of the two tensor files.
    pub(super) hashes: [u64; 2],
}

impl State {
    /// What the processes of a run have to agree on, by name.
    pub(super) fn identity(&self) -> [(&'static str, u64); 4] {
        // Where its tokenizer lies is each machine's own matter: the text as tokens is compared.
        let settings = self.settings.lines().filter(|line| !line.starts_with("tokenizer = "));
        let settings = settings.collect::<Vec<_>>().join("\n");
        [
            ("the base model", xxh3_64(self.base.as_bytes())),
            ("the training text", self.corpus),
            ("a setting of the run", xxh3_64(settings.as_bytes())),
            ("the step that the run goes on from", self.step),
        ]
    }
}

/// Where the checkpoint of `step` lies.
pub(super) fn folder(output: &Path, step: u64) -> PathBuf {
    folder_of(output).join(format!("step-{step:08}"))
}

fn folder_of(output: &Path) -> PathBuf {
    output.join("checkpoints")
}

/// The tensors of a checkpoint, whole, on the processor.
pub(super) struct Contents {
    trained: HashMap<String, Tensor>,
    moments: HashMap<String, Tensor>,
}

impl Contents {
    /// Of `model` and `optimizer`: every process of a tensor group gives its parts, the first gets all of them and the
    /// others nothing.
    ///
    /// # Errors
    /// `Incompatible` if what every process has is not the same on each; if another process is gone.
    pub(super) fn gather(model: &TrainModel, optimizer: &AdamW) -> Result<Option<Self>> {
        let (mut trained, mut moments) = (HashMap::new(), HashMap::new());
        let (mut same, group) = (Vec::new(), &model.group);
        let first = group.index() == 0;
        for parameter in &model.parameters {
            let (name, master) = (&parameter.name, parameter.master());
            let whole = group.whole(name, master)?;
            if !group.is_alone() && Placement::of(name).split().is_none() {
                let values = whole.flatten_all()?.to_vec1::<f32>()?;
                let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
                same.push((name.as_str(), xxh3_64(&bytes)));
            }
            if first {
                trained.insert(name.clone(), whole);
            }
        }
        group.agree(&same)?;
        for (index, m, v) in optimizer.moments()? {
            let name = &model.parameters[index].name;
            for (kind, moment) in [("first", m), ("second", v)] {
                let whole = group.whole(name, &moment)?;
                if first {
                    moments.insert(format!("{kind}.{name}"), whole);
                }
            }
        }
        Ok(first.then_some(Self { trained, moments }))
    }
}

/// Writes a checkpoint of `state.step`, and removes those of later steps and the oldest beyond `keep`.
///
/// The folder gets its name after everything in it is on disk: a kill at any moment leaves the last one whole.
/// Later ones were passed over as damaged when the run was opened, and are written again as it goes on.
pub(super) fn write(
    output: &Path,
    mut state: State,
    Contents { trained, moments }: &Contents,
    keep: usize,
) -> Result<PathBuf> {
    let folder = folder_of(output);
    let name = format!("step-{:08}", state.step);
    let (partial, whole) = (folder.join(format!(".{name}.partial")), folder.join(&name));
    let io = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| Error::io(what, &path, source)
    };
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(io("remove unfinished checkpoint", &partial))?;
    }
    fs::create_dir_all(&partial).map_err(io("make checkpoint folder", &partial))?;
    for (i, (file, tensors)) in [(TRAINED, trained), (MOMENTS, moments)].into_iter().enumerate() {
        let bytes = safetensors::serialize(tensors, None).map_err(|source| {
            Error::new(ErrorKind::Storage, format!("checkpoint {name}: {source}"))
                .with_source(source)
        })?;
        state.hashes[i] = xxh3_64(&bytes);
        write_synced(&partial.join(file), &bytes)?;
    }
    let text = serde_json::to_vec_pretty(&state).map_err(|source| {
        Error::new(ErrorKind::Storage, format!("checkpoint {name}: {source}")).with_source(source)
    })?;
    write_synced(&partial.join(STATE), &text)?;
    if whole.exists() {
        fs::remove_dir_all(&whole).map_err(io("replace checkpoint", &whole))?;
    }
    fs::rename(&partial, &whole).map_err(io("name checkpoint", &whole))?;
    File::open(&folder)
        .and_then(|folder| folder.sync_all())
        .map_err(io("sync checkpoint folder", &folder))?;
    let (earlier, later): (Vec<_>, Vec<_>) =
        list(output)?.into_iter().partition(|path| *path <= whole);
    let old = &earlier[..earlier.len().saturating_sub(keep)];
    for path in old.iter().chain(&later) {
        fs::remove_dir_all(path).map_err(io("remove old checkpoint", path))?;
    }
    Ok(whole)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes)
        .and_then(|()| File::open(path)?.sync_all())
        .map_err(|e| Error::io("write checkpoint", path, e))
}

/// Finished checkpoints of a run, the oldest first.
pub(super) fn list(output: &Path) -> Result<Vec<PathBuf>> {
    let folder = folder_of(output);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(&folder).map_err(|e| Error::io("list checkpoints", &folder, e))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_prefix("step-"))
                .is_some_and(|step| step.bytes().all(|byte| byte.is_ascii_digit()))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// A checkpoint whose files are whole.
pub(super) struct Checkpoint {
    pub(super) path: PathBuf,
    pub(super) state: State,
    trained: HashMap<String, Tensor>,
    moments: HashMap<String, Tensor>,
}

impl Checkpoint {
    /// The newest checkpoint of the run in `output` that is whole; a damaged one is passed over, and removed by the next save.
    ///
    /// # Errors
    /// `Corrupted` if there are checkpoints and none is whole; `Storage` or `Incompatible` if one cannot be read now, or not
    /// by this version: it may be whole.
    pub(super) fn newest(output: &Path) -> Result<Option<Self>> {
        let all = list(output)?;
        let mut first = None;
        for path in all.iter().rev() {
            match Self::open(path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) if error.kind() == ErrorKind::Corrupted => {
                    tracing::warn!("passed over: {error}");
                    first.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        first.map_or(Ok(None), Err)
    }

    /// # Errors
    /// `Corrupted` naming the file that is missing, cut or changed; `Storage` if one cannot be read; `Incompatible` if another
    /// version wrote it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let damaged = |file: &str, what: String| {
            Error::new(
                ErrorKind::Corrupted,
                format!("checkpoint {}: {file}: {what}", path.display()),
            )
        };
        let read = |file: &str| {
            let path = path.join(file);
            fs::read(&path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => damaged(file, e.to_string()).with_source(e),
                _ => Error::io("read checkpoint", &path, e),
            })
        };
        #[derive(serde::Deserialize)]
        struct Version {
            version: u32,
        }
        let state = read(STATE)?;
        let unread = |e: serde_json::Error| damaged(STATE, e.to_string()).with_source(e);
        // First, for another version may have other fields.
        let Version { version } = serde_json::from_slice(&state).map_err(unread)?;
        if version != 1 {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!("checkpoint {}: version {version}, expected 1", path.display()),
            ));
        }
        let state: State = serde_json::from_slice(&state).map_err(unread)?;
        let tensors = |file: &str, hash: u64| {
            let bytes = read(file)?;
            if xxh3_64(&bytes) != hash {
                return Err(damaged(file, "checksum differs".into()));
            }
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
                .map_err(|e| damaged(file, e.to_string()).with_source(e))
        };
        let trained = tensors(TRAINED, state.hashes[0])?;
        let moments = tensors(MOMENTS, state.hashes[1])?;
        Ok(Self { path: path.to_owned(), state, trained, moments })
    }

    /// Trained tensors by name, f32.
    pub(super) fn trained(&self) -> &HashMap<String, Tensor> {
        &self.trained
    }

    /// The tensor `name` of `parameter`, the part of `group`'s process in the shape and on the device of its values.
    fn tensor(
        &self,
        from: &HashMap<String, Tensor>,
        name: &str,
        (parameter, group): (&Parameter, &TensorGroup),
    ) -> Result<Tensor> {
        let like = parameter.master();
        let shape = group.whole_shape(&parameter.name, like.dims());
        let incompatible = |found: String| {
            Error::new(
                ErrorKind::Incompatible,
                format!(
                    "checkpoint {}: tensor {name}, expected shape {shape:?}, found {found}",
                    self.path.display(),
                ),
            )
        };
        let tensor = from.get(name).ok_or_else(|| incompatible("none".into()))?;
        if tensor.dims() != shape {
            return Err(incompatible(format!("{:?}", tensor.dims())));
        }
        Ok(group.part(&parameter.name, tensor)?.to_device(like.device())?)
    }

    /// Puts the trained tensors into `model` and, where there is one, the moments into `optimizer`.
    ///
    /// # Errors
    /// `Incompatible` if the checkpoint has not the tensors that the model trains, all of them and no other.
    pub(super) fn restore(&self, model: &TrainModel, optimizer: Option<&mut AdamW>) -> Result<()> {
        let known = |name: &String| model.parameters.iter().any(|p| p.name == *name);
        if let Some(extra) = self.trained.keys().find(|name| !known(name)) {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "checkpoint {}: tensor {extra}, expected none of this name",
                    self.path.display()
                ),
            ));
        }
        for parameter in &model.parameters {
            let place = (parameter, &model.group);
            parameter.set(&self.tensor(&self.trained, &parameter.name, place)?)?;
        }
        if let Some(optimizer) = optimizer {
            optimizer.restore(|index, kind| {
                let parameter = &model.parameters[index];
                let name = format!("{kind}.{}", parameter.name);
                self.tensor(&self.moments, &name, (parameter, &model.group))
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::TrainingConfig;

    #[test]
    fn the_parts_of_one_run_may_have_their_tokenizer_at_different_paths() {
        let identity = |change: &dyn Fn(&mut TrainingConfig)| {
            let mut config = TrainingConfig::default();
            change(&mut config);
            let settings = config.to_toml().unwrap();
            let base = "base".to_owned();
            let state = State {
                version: 1,
                step: 3,
                base,
                corpus: 7,
                settings,
                replicas: 2,
                hashes: [0; 2],
            };
            state.identity()
        };
        let at = |path: &'static str| {
            identity(&move |config| config.data.tokenizer = Some(path.to_owned()))
        };
        assert_eq!(at("/here/tokenizer.json"), at("/there/tokenizer.json"));
        assert_ne!(at("/here/tokenizer.json"), identity(&|config| config.seed += 1));
    }
}
