//! What files hold, as hashes for the header of a run: two texts or models of one name are two runs.
//! Knows no run and no benchmark.

use crate::job::Result;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// What a model's folder holds beside its weights, as far as an answer depends on it.
const SETTINGS: [&str; 5] = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Of weights a sample is read, 20 MiB of a file of any size: the beginning, where a GGUF file has its vocabulary and chat
/// template, and blocks spread evenly to the end, of which training changes some.
const HEAD_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u64 = 64 << 10;
const NUM_BLOCKS: u64 = 64;

/// The hash of each of `paths`, by the path.
///
/// # Errors
/// If one cannot be read.
pub(crate) fn of_files<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Value> {
    let mut hashes = Map::new();
    for path in paths {
        hashes.insert(path.display().to_string(), hash(path)?.into());
    }
    Ok(hashes.into())
}

/// The hashes of what a model is loaded from, a folder or a GGUF file, by the names of the files.
///
/// # Errors
/// If one cannot be read.
pub(crate) fn of_model(path: &Path) -> Result<Value> {
    let files = match path.is_dir() {
        true => {
            let settings = SETTINGS.iter().map(|name| path.join(name));
            let mut files: Vec<_> = settings.filter(|file| file.is_file()).collect();
            files.extend(weights_in(path)?);
            files
        }
        false => vec![path.to_owned()],
    };
    let mut hashes = Map::new();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        hashes.insert(name.into_owned(), hash(&file)?.into());
    }
    Ok(hashes.into())
}

/// The weights that an engine reads of a folder: others may lie beside them.
fn weights_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_there = |name: &str| Some(folder.join(name)).filter(|file| file.is_file());
    let mut files: Vec<_> = is_there("mka.safetensors").into_iter().collect();
    if let Some(single) = is_there("model.safetensors") {
        files.push(single);
    } else if let Some(index) = is_there("model.safetensors.index.json") {
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", index.display());
        let text = std::fs::read(&index).map_err(|e| failed(&e))?;
        let index: Value = serde_json::from_slice(&text).map_err(|e| failed(&e))?;
        let shards = index["weight_map"].as_object().into_iter().flat_map(Map::values);
        let shards: BTreeSet<&str> = shards.filter_map(Value::as_str).collect();
        files.extend(shards.into_iter().map(|shard| folder.join(shard)));
    }
    Ok(files)
}

fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|kind| kind == "safetensors" || kind == "gguf")
}

/// XXH3 of what a file holds, or of a sample of weights, and its length.
fn hash(path: &Path) -> Result<String> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut hash = Xxh3::new();
        let mut buffer = vec![0; 1 << 16];
        let mut add = |start: u64, num_bytes: u64| -> io::Result<()> {
            file.seek(SeekFrom::Start(start))?;
            let mut part = file.by_ref().take(num_bytes);
            loop {
                match part.read(&mut buffer)? {
                    0 => return Ok(()),
                    len => hash.update(&buffer[..len]),
                }
            }
        };
        if is_weights(path) {
            add(0, HEAD_BYTES)?;
            let last = len.saturating_sub(BLOCK_BYTES);
            for block in 0..NUM_BLOCKS {
                add(last * block / (NUM_BLOCKS - 1), BLOCK_BYTES)?;
            }
        } else {
            add(0, u64::MAX)?;
        }
        Ok(format!("{:016x}, {len} bytes", hash.digest()))
    };
    read().map_err(|e| format!("{}: {e}", path.display()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_name_are_told_apart_by_what_they_hold() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("essays.txt");
        let of = |text: &str| {
            std::fs::write(&path, text).unwrap();
            of_files([path.as_path()]).unwrap()
        };
        let first = of("The end is near.");
        let hash = first[path.to_str().unwrap()].as_str().unwrap();
        assert!(hash.ends_with(", 16 bytes") && hash.len() == 16 + 10, "{hash}");
        assert_ne!(of("The end is here."), first);
        assert_ne!(of("The end is near..."), first);
        assert_eq!(of("The end is near."), first);
        let error = of_files([folder.path().join("none").as_path()]).unwrap_err().to_string();
        assert!(error.contains("none: "), "{error}");
    }

    #[test]
    fn a_model_is_its_weights_tokenizer_and_template() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(model.join(name), bytes).unwrap();
        let len = (HEAD_BYTES + 2 * NUM_BLOCKS * BLOCK_BYTES) as usize;
        let mut weights = vec![7u8; len];
        write("model.safetensors", &weights);
        write("config.json", b"{}");
        write("tokenizer.json", b"{}");
        write("README.md", b"A model.");
        let first = of_model(&model).unwrap();
        let names: Vec<&String> = first.as_object().unwrap().keys().collect();
        assert_eq!(names, ["config.json", "tokenizer.json", "model.safetensors"]);
        // What no answer depends on may come and change.
        write("README.md", b"The same model.");
        write("consolidated.safetensors", b"others");
        assert_eq!(of_model(&model).unwrap(), first);
        for place in [0, HEAD_BYTES as usize - 1, len - 1] {
            weights[place] = 8;
            write("model.safetensors", &weights);
            assert_ne!(of_model(&model).unwrap(), first, "byte {place}");
            weights[place] = 7;
        }
        // Training changes most numbers, wherever they are.
        weights[len - 32 * BLOCK_BYTES as usize..len - 24 * BLOCK_BYTES as usize].fill(8);
        write("model.safetensors", &weights);
        assert_ne!(of_model(&model).unwrap(), first);
        write("model.safetensors", &vec![7; len]);
        assert_eq!(of_model(&model).unwrap(), first);
        for (name, text) in [("tokenizer.json", "{ }"), ("chat_template.jinja", "{{ a }}")] {
            write(name, text.as_bytes());
            assert_ne!(of_model(&model).unwrap(), first, "{name}");
        }
        std::fs::remove_file(model.join("model.safetensors")).unwrap();
        let index =
            r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "1.safetensors"}}"#;
        write("model.safetensors.index.json", index.as_bytes());
        write("1.safetensors", b"1");
        write("2.safetensors", b"2");
        let shards = of_model(&model).unwrap();
        assert!(
            shards["1.safetensors"].is_string() && shards["2.safetensors"].is_string(),
            "{shards}"
        );
        assert_ne!(shards["1.safetensors"], shards["2.safetensors"]);
        assert!(shards.get("consolidated.safetensors").is_none(), "{shards}");
        let gguf = folder.path().join("model.gguf");
        std::fs::write(&gguf, b"GGUF").unwrap();
        let short = of_model(&gguf).unwrap();
        assert!(short["model.gguf"].as_str().unwrap().ends_with(", 4 bytes"), "{short}");
        std::fs::write(&gguf, b"GGUf").unwrap();
        assert_ne!(of_model(&gguf).unwrap(), short);
    }
}
