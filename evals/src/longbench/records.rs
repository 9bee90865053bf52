//! Where the records of a data file lie, and reading one of them: the files are too large to hold.
//! Knows no task and no prompt.

use crate::job::Result;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Where one record lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    offset_bytes: u64,
    len_bytes: usize,
    /// The line it begins in, from 1.
    line: usize,
}

/// A file of JSON records: one a line, or all in one array.
#[derive(Debug)]
pub(super) struct Records {
    path: PathBuf,
}

impl Records {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Parses every record in the order of the file until `visit` returns false.
    ///
    /// # Errors
    /// If the file cannot be read, a record is not a `T` or `visit` refuses it; the text names the file and the line.
    pub(super) fn scan<T: DeserializeOwned>(
        &self,
        mut visit: impl FnMut(Place, T) -> Result<bool, &'static str>,
    ) -> Result<()> {
        let mut text = Vec::new();
        let mut cursor = Cursor::new(BufReader::with_capacity(1 << 16, self.open()?));
        loop {
            let place =
                cursor.next_record(&mut text).map_err(|error| self.error("read", &error))?;
            let Some(place) = place else { return Ok(()) };
            let goes_on = visit(place, self.parse(place, &text)?)
                .map_err(|what| self.error("parse", &format!("line {}: {what}", place.line)))?;
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Reads the record at `place`.
    ///
    /// # Errors
    /// As [`Self::scan`], if the file has changed since.
    pub(super) fn read<T: DeserializeOwned>(&self, place: Place) -> Result<T> {
        let mut file = self.open()?;
        let mut text = vec![0; place.len_bytes];
        file.seek(SeekFrom::Start(place.offset_bytes))
            .and_then(|_| file.read_exact(&mut text))
            .map_err(|error| self.error("read", &error))?;
        self.parse(place, &text)
    }

    fn open(&self) -> Result<File> {
        File::open(&self.path).map_err(|error| self.error("open", &error))
    }

    fn parse<T: DeserializeOwned>(&self, place: Place, text: &[u8]) -> Result<T> {
        serde_json::from_slice(text).map_err(|error| {
            self.error("parse", &format!("line {}: {error} of the record", place.line))
        })
    }

    fn error(&self, operation: &str, error: &dyn std::fmt::Display) -> Box<dyn std::error::Error> {
        format!("longbench: {operation} {}: {error}", self.path.display()).into()
    }
}

/// Goes through the text of a file record by record.
struct Cursor<R> {
    reader: R,
    offset_bytes: u64,
    line: usize,
    /// Whether the records are the elements of one array; unknown before the first.
    in_array: Option<bool>,
}

impl<R: BufRead> Cursor<R> {
    fn new(reader: R) -> Self {
        Self { reader, offset_bytes: 0, line: 1, in_array: None }
    }

    /// Puts the next record's bytes into `text`; none after the last.
    fn next_record(&mut self, text: &mut Vec<u8>) -> io::Result<Option<Place>> {
        text.clear();
        loop {
            let start = (self.offset_bytes, self.line);
            let Some(byte) = self.next_byte()? else {
                return match self.in_array {
                    Some(true) => Err(self.malformed("end of the file within the array")),
                    _ => Ok(None),
                };
            };
            match (byte, self.in_array) {
                (b' ' | b'\t' | b'\r' | b'\n', _) | (b',', Some(true)) => continue,
                (b'[', None) => self.in_array = Some(true),
                (b']', Some(true)) => return Ok(None),
                (b'{', Some(true)) => {
                    text.push(byte);
                    self.push_rest_of_object(text)?;
                    return Ok(Some(self.place(start, text)));
                }
                (_, Some(true)) => return Err(self.malformed("expected an object in the array")),
                _ => {
                    self.in_array = Some(false);
                    text.push(byte);
                    self.push_rest_of_line(text)?;
                    return Ok(Some(self.place(start, text)));
                }
            }
        }
    }

    fn push_rest_of_line(&mut self, text: &mut Vec<u8>) -> io::Result<()> {
        self.offset_bytes += self.reader.read_until(b'\n', text)? as u64;
        self.line += 1;
        Ok(())
    }

    /// Reads up to the brace that closes the object; braces within strings do not count.
    fn push_rest_of_object(&mut self, text: &mut Vec<u8>) -> io::Result<()> {
        let (mut depth, mut in_string, mut is_escaped) = (1usize, false, false);
        while depth > 0 {
            let byte = self
                .next_byte()?
                .ok_or_else(|| self.malformed("end of the file within a record"))?;
            text.push(byte);
            match byte {
                _ if is_escaped => is_escaped = false,
                b'\\' if in_string => is_escaped = true,
                b'"' => in_string = !in_string,
                b'{' if !in_string => depth += 1,
                b'}' if !in_string => depth -= 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn next_byte(&mut self) -> io::Result<Option<u8>> {
        let byte = self.reader.fill_buf()?.first().copied();
        if let Some(byte) = byte {
            self.reader.consume(1);
            self.offset_bytes += 1;
            self.line += usize::from(byte == b'\n');
        }
        Ok(byte)
    }

    fn place(&self, (offset_bytes, line): (u64, usize), text: &[u8]) -> Place {
        Place { offset_bytes, len_bytes: text.len(), line }
    }

    fn malformed(&self, what: &str) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, format!("line {}: {what}", self.line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// What a scan of a file with `text` finds, read again by its places.
    fn scanned(text: &str) -> Result<Vec<(usize, Value)>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, text)?;
        let records = Records::new(path);
        let mut places = Vec::new();
        records.scan(|place, _: Value| {
            places.push(place);
            Ok(true)
        })?;
        places.into_iter().map(|place| Ok((place.line, records.read(place)?))).collect()
    }

    #[test]
    fn lines_and_arrays_give_the_same_records() {
        let expected = [json!({"a": "é}{\\\"["}), json!({"b": [{"c": 1}]})];
        let (first, second) = (&expected[0], &expected[1]);
        let pretty = serde_json::to_string_pretty(&expected).unwrap();
        let cases = [
            (format!("{first}\n{second}"), [1, 2]),
            (format!("\n{first}\r\n\n{second}\n"), [2, 4]),
            (format!("[{first}, {second}]"), [1, 1]),
            (pretty, [2, 5]),
        ];
        for (text, lines) in cases {
            let found = scanned(&text).unwrap();
            assert_eq!(found.iter().map(|(_, record)| record).collect::<Vec<_>>(), [first, second]);
            assert_eq!(found.iter().map(|(line, _)| *line).collect::<Vec<_>>(), lines);
        }
    }

    #[test]
    fn malformed_files_are_named_with_the_line() {
        let cases = [
            ("{}\n{\"a\": }\n", "line 2: "),
            ("{}\n\nnull x\n", "line 3: "),
            ("[\n{},\n{\"a\": 1\n", "line 4: end of the file within a record"),
            ("[\n{}\n", "line 3: end of the file within the array"),
            ("[1]", "line 1: expected an object in the array"),
        ];
        for (text, expected) in cases {
            let error = scanned(text).unwrap_err().to_string();
            assert!(error.contains("data.jsonl: ") && error.contains(expected), "{error}");
        }
    }
}
