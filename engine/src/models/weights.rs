//! The bytes of a checkpoint, mapped, found by name and checked against the shape that the config implies.
//! Knows no forward pass. Matrices stay in their stored type and point into the mapped file.

use super::config::DecoderConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::gguf::{GgmlType, Gguf};
use candle_core::{Device, Tensor};
use memmap2::Mmap;
use mka_kernels::{PackedMatrix, PackedType};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

/// A file in memory, shared by the matrices that point into it.
type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

struct Entry {
    file: usize,
    ty: PackedType,
    /// Row-major, as HuggingFace writes it.
    shape: Vec<usize>,
    range: Range<usize>,
}

/// Every tensor of one checkpoint by its HuggingFace name.
pub(crate) struct Weights {
    files: Vec<(PathBuf, Bytes)>,
    entries: HashMap<String, Entry>,
    /// llama.cpp stores the query and key rows of some architectures interleaved for its own RoPE.
    interleaved_heads: bool,
    place: String,
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::io("open model file", path, e))?;
    // SAFETY: the map is read-only and private; a model file that another process rewrites while it is loaded is
    // outside what any loader of mapped weights can support, and is documented at `EngineBuilder::model`.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map model file", path, e))
}

/// The files that an index of weights names, each once.
///
/// # Errors
/// `Model` where it is no index, or names what is no plain file name: that is data from outside, and may not lead out of
/// the folder.
pub(crate) fn shard_names(index: &Path) -> Result<Vec<String>> {
    let wrong = |what: String| Error::model(format!("{}: {what}", index.display()));
    let text =
        std::fs::read_to_string(index).map_err(|e| Error::io("read shard index", index, e))?;
    let json: Value =
        serde_json::from_str(&text).map_err(|e| wrong(e.to_string()).with_source(e))?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| wrong("weight_map, found none".into()))?;
    let mut names: Vec<String> =
        map.values().filter_map(Value::as_str).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    match names.iter().find(|name| !is_file_name(name)) {
        Some(name) => Err(wrong(format!("shard {name:?}, expected a file name"))),
        None => Ok(names),
    }
}

/// Whether `name` names a file of the folder that it is looked for in.
pub(crate) fn is_file_name(name: &str) -> bool {
    Path::new(name).file_name().and_then(|own| own.to_str()) == Some(name)
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, and `mka.safetensors` if there.
    pub(crate) fn open_folder(folder: &Path) -> Result<Self> {
        let mut weights = Self {
            files: Vec::new(),
            entries: HashMap::new(),
            interleaved_heads: false,
            place: folder.display().to_string(),
        };
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        if single.exists() {
            weights.add_safetensors(&single)?;
        } else if index.exists() {
            for shard in shard_names(&index)? {
                weights.add_safetensors(&folder.join(shard))?;
            }
        } else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "open model {}: expected model.safetensors or model.safetensors.index.json, found neither",
                    folder.display()
                ),
            ));
        }
        let mka = folder.join("mka.safetensors");
        if mka.exists() {
            weights.add_safetensors(&mka)?;
        }
        Ok(weights)
    }

    fn add_safetensors(&mut self, path: &Path) -> Result<()> {
        let mmap = map(path)?;
        let damaged = |what: String| {
            Error::new(ErrorKind::Corrupted, format!("safetensors {}: {what}", path.display()))
        };
        let (header_len, metadata) = safetensors::SafeTensors::read_metadata(&mmap)
            .map_err(|e| damaged(e.to_string()).with_source(e))?;
        for (name, info) in metadata.tensors() {
            let ty = match info.dtype {
                safetensors::Dtype::F32 => PackedType::F32,
                safetensors::Dtype::F16 => PackedType::F16,
                safetensors::Dtype::BF16 => PackedType::BF16,
                other => {
                    return Err(Error::model(format!(
                        "safetensors {}: tensor {name} is {other:?}, expected F32, F16 or BF16",
                        path.display()
                    )));
                }
            };
            let (start, end) = info.data_offsets;
            let start = start.saturating_add(8 + header_len);
            let end = end.saturating_add(8 + header_len);
            if end > mmap.len() || start > end {
                return Err(damaged(format!(
                    "tensor {name} ends at byte {end}, the file has {}",
                    mmap.len()
                )));
            }
            self.entries.insert(
                name.clone(),
                Entry { file: self.files.len(), ty, shape: info.shape.clone(), range: start..end },
            );
        }
        self.files.push((path.to_owned(), Arc::new(mmap)));
        Ok(())
    }

    /// Opens the tensors of a GGUF file under their HuggingFace names.
    pub(crate) fn open_gguf(path: &Path) -> Result<(Self, Gguf)> {
        let mmap = map(path)?;
        let gguf = Gguf::parse(&mmap, path)?;
        let arch = gguf.str("general.architecture")?;
        let mut entries = HashMap::new();
        for (name, info) in &gguf.tensors {
            let Some(name) = huggingface_name(name, arch) else { continue };
            let ty = packed_type(info.ggml_type).ok_or_else(|| {
                Error::model(format!(
                    "gguf: tensor {name} is {:?}, which is not supported",
                    info.ggml_type
                ))
            })?;
            let (shape, range) = (info.shape.clone(), info.range.clone());
            entries.insert(name, Entry { file: 0, ty, shape, range });
        }
        let interleaved_heads = matches!(arch, "llama" | "granite" | "smollm3");
        let files: Vec<(PathBuf, Bytes)> = vec![(path.to_owned(), Arc::new(mmap))];
        let place = path.display().to_string();
        Ok((Self { files, entries, interleaved_heads, place }, gguf))
    }

    /// The same weights with every tensor decoded to f32.
    #[cfg(test)]
    pub(crate) fn decoded(mut self) -> Self {
        let mut decoded = Vec::new();
        for entry in self.entries.values_mut() {
            let cols = entry.shape.last().copied().unwrap_or(1);
            let rows = entry.shape.iter().product::<usize>() / cols.max(1);
            let bytes = self.files[entry.file].1.clone();
            let matrix = PackedMatrix::new(entry.ty, rows, cols, bytes, entry.range.clone());
            let mut values = vec![0f32; rows * cols];
            matrix.unwrap().dequantize_rows(0..rows, &mut values).unwrap();
            let start = decoded.len();
            decoded.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            (entry.file, entry.ty, entry.range) =
                (self.files.len(), PackedType::F32, start..decoded.len());
        }
        self.files.push((PathBuf::new(), Arc::new(decoded)));
        self
    }

    /// The names of all tensors, in no order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.entries.keys()
    }

    /// Numbers of all tensors together.
    pub(crate) fn num_values(&self) -> usize {
        self.entries.values().map(|entry| entry.shape.iter().product::<usize>()).sum()
    }

    /// Rows of the matrix `name`, if there is one.
    pub(crate) fn rows(&self, name: &str) -> Option<usize> {
        self.entries.get(name).filter(|entry| entry.shape.len() == 2).map(|entry| entry.shape[0])
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    fn entry(&self, name: &str, shape: &[usize]) -> Result<&Entry> {
        let entry = self.entries.get(name).ok_or_else(|| {
            Error::model(format!(
                "{}: tensor {name}, expected shape {shape:?}, found none",
                self.place
            ))
        })?;
        if entry.shape != shape {
            return Err(Error::model(format!(
                "{}: tensor {name}, expected shape {shape:?}, found {:?}",
                self.place, entry.shape
            )));
        }
        Ok(entry)
    }

    /// The matrix `name` of shape (rows, cols).
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<PackedMatrix> {
        let entry = self.entry(name, &[rows, cols])?;
        let bytes = self.files[entry.file].1.clone();
        PackedMatrix::new(entry.ty, rows, cols, bytes, entry.range.clone()).map_err(|source| {
            Error::model(format!("{}: tensor {name}: {source}", self.place)).with_source(source)
        })
    }

    /// The query or key projection `name`, which is `matrix`, its rows as RoPE turns them here: a row of a head and the one
    /// half a head on. Of its `head_dim` rows the file has the first `rotary_dim` turned.
    pub(crate) fn head_matrix(
        &self,
        name: &str,
        matrix: PackedMatrix,
        head_dim: usize,
        rotary_dim: usize,
    ) -> Result<PackedMatrix> {
        let Some(order) = self.head_order(matrix.rows(), head_dim, rotary_dim) else {
            return Ok(matrix);
        };
        matrix.permute_rows(&order).map_err(|source| {
            Error::model(format!("{}: tensor {name}: {source}", self.place)).with_source(source)
        })
    }

    /// Which stored row each of `rows` rows of heads is; None where they are in place.
    fn head_order(&self, rows: usize, head_dim: usize, rotary_dim: usize) -> Option<Vec<usize>> {
        let stored = |row: usize| match self.interleaved_heads {
            true => interleaved_row(row, head_dim),
            false => partly_rotated_row(row, head_dim, rotary_dim),
        };
        let is_moved = self.interleaved_heads || rotary_dim != head_dim;
        is_moved.then(|| (0..rows).map(stored).collect())
    }

    /// The vector `name` of `len` values, as f32.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.values(name, len)?, len, &Device::Cpu)?)
    }

    /// The bias of a query or key projection, its values as [`Weights::head_matrix`] has its rows.
    pub(crate) fn head_vector(
        &self,
        name: &str,
        len: usize,
        head_dim: usize,
        rotary_dim: usize,
    ) -> Result<Tensor> {
        let values = self.values(name, len)?;
        let ordered = match self.head_order(len, head_dim, rotary_dim) {
            Some(order) => order.into_iter().map(|row| values[row]).collect(),
            None => values,
        };
        Ok(Tensor::from_vec(ordered, len, &Device::Cpu)?)
    }

    /// The values of the vector `name`.
    pub(crate) fn values(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let entry = self.entry(name, &[len])?;
        let bytes = self.files[entry.file].1.clone();
        let mut values = vec![0f32; len];
        PackedMatrix::new(entry.ty, 1, len, bytes, entry.range.clone())
            .and_then(|matrix| matrix.dequantize_rows(0..1, &mut values))
            .map_err(|source| {
                Error::model(format!("{}: tensor {name}: {source}", self.place)).with_source(source)
            })?;
        Ok(values)
    }

    /// Identity of these weights under `config`: 128 bits over the description and a sample of every file.
    ///
    /// Of each file the first MiB (headers, names, offsets), the length and 64 blocks of 64 KiB spread evenly are
    /// hashed: 5 MiB of reading whatever the size, and a fine-tuned copy differs in every block.
    pub(crate) fn fingerprint(&self, config: &DecoderConfig) -> [u8; 16] {
        const HEAD: usize = 1 << 20;
        const BLOCK: usize = 64 << 10;
        const BLOCKS: usize = 64;
        let mut hash = Xxh3::new();
        hash.update(format!("{config:?}").as_bytes());
        for (_, file) in &self.files {
            let bytes = (**file).as_ref();
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(&bytes[..bytes.len().min(HEAD)]);
            for block in 0..BLOCKS {
                let start = bytes.len() / BLOCKS * block;
                hash.update(&bytes[start..bytes.len().min(start + BLOCK)]);
            }
        }
        hash.digest128().to_le_bytes()
    }
}

/// Where llama.cpp put the row that HuggingFace has at `row`: pairs (j, j + d/2) of a head lie side by side.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, j) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * j + half
}

/// Where HuggingFace has the row that is at `row` here, of a head whose first `rotary_dim` rows are turned: its pairs are
/// (j, j + rotary_dim/2), ours (j, j + head_dim/2), and rows that are not turned stand behind those that are in each half.
fn partly_rotated_row(row: usize, head_dim: usize, rotary_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, j) = (within / (head_dim / 2), within % (head_dim / 2));
    let turned = rotary_dim / 2;
    let within = match j < turned {
        true => half * turned + j,
        false => rotary_dim + half * (head_dim / 2 - turned) + (j - turned),
    };
    head * head_dim + within
}

fn packed_type(ty: GgmlType) -> Option<PackedType> {
    Some(match ty {
        GgmlType::F32 => PackedType::F32,
        GgmlType::F16 => PackedType::F16,
        GgmlType::BF16 => PackedType::BF16,
        GgmlType::Q4_0 => PackedType::Q4_0,
        GgmlType::Q4_1 => PackedType::Q4_1,
        GgmlType::Q5_0 => PackedType::Q5_0,
        GgmlType::Q5_1 => PackedType::Q5_1,
        GgmlType::Q8_0 => PackedType::Q8_0,
        GgmlType::Q2K => PackedType::Q2K,
        GgmlType::Q3K => PackedType::Q3K,
        GgmlType::Q4K => PackedType::Q4K,
        GgmlType::Q5K => PackedType::Q5K,
        GgmlType::Q6K => PackedType::Q6K,
        _ => return None,
    })
}

/// The HuggingFace name of a tensor of a GGUF file of architecture `arch`; None for tensors that the decoder does not read.
fn huggingface_name(name: &str, arch: &str) -> Option<String> {
    const TOP: &[(&str, &str)] = &[
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("output", "lm_head"),
        ("rope_freqs", "rope_freqs"),
        ("rope_factors_long", "rope_factors_long"),
        ("rope_factors_short", "rope_factors_short"),
    ];
    const LAYER: &[(&str, &str)] = &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    // Names that mean something else there, or that no other architecture has.
    const PHI3: &[(&str, &str)] =
        &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")];
    const GEMMA3: &[(&str, &str)] = &[
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ];
    let own = match arch {
        "phi3" => PHI3,
        "gemma3" => GEMMA3,
        _ => &[],
    };
    let find = |table: &[(&str, &'static str)], stem: &str| {
        table.iter().find(|(gguf, _)| *gguf == stem).map(|(_, name)| *name)
    };
    let (stem, kind) = name.rsplit_once('.')?;
    if let Some(rest) = stem.strip_prefix("blk.") {
        let (layer, stem) = rest.split_once('.')?;
        let place = find(own, stem).or_else(|| find(LAYER, stem))?;
        return Some(format!("model.layers.{layer}.{place}.{kind}"));
    }
    Some(format!("{}.{kind}", find(TOP, stem)?))
}
