//! Append-only segment files: checksummed records that the database refers to.
//! Knows nothing of what a record means.

mod walk;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::lock::Lock;
use super::page_bytes::{Mapped, PageBytes};
use crate::cipher::{Cipher, SEAL_BYTES};
use crate::format::{
    BlobRef, Kind, MAX_PAYLOAD_BYTES, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, is_segment_header,
    parse_record_header, parts_hash, payload_hash, record_header, segment_header,
};
use crate::{Error, Result};

/// A segment is sealed once it holds so much.
pub(crate) const SEGMENT_BYTES: u64 = 64 << 20;
/// Records are gathered up to this size before they are written.
const BUFFER_BYTES: usize = 4 << 20;

/// An open segment file. Stays readable through this handle after its file was removed.
#[derive(Debug)]
pub(crate) struct Segment {
    number: u32,
    path: PathBuf,
    file: File,
    /// Opens the payloads of an encrypted store.
    cipher: Option<Arc<Cipher>>,
}

impl Segment {
    fn create(folder: &Path, number: u32, cipher: Option<Arc<Cipher>>) -> Result<Self> {
        let path = file_path(folder, number);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|source| Error::io("create", &path, source))?;
        file.write_all_at(&segment_header(number), 0)
            .map_err(|source| Error::io("write", &path, source))?;
        Ok(Self { number, path, file, cipher })
    }

    fn open(folder: &Path, number: u32, cipher: Option<Arc<Cipher>>) -> Result<Self> {
        let path = file_path(folder, number);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|source| Error::io("open", &path, source))?;
        Ok(Self { number, path, file, cipher })
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub(crate) fn len(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        metadata.map(|m| m.len()).map_err(|source| Error::io("read", &self.path, source))
    }

    /// Whether the file begins as a segment of this number and of a version that is read does.
    pub(crate) fn header_is_intact(&self) -> bool {
        let mut header = [0; SEGMENT_HEADER_BYTES as usize];
        self.file.read_exact_at(&mut header, 0).is_ok() && is_segment_header(self.number, &header)
    }

    /// Writes the header anew; the records behind it stay as they are.
    pub(crate) fn mend_header(&self) -> Result<()> {
        self.file
            .write_all_at(&segment_header(self.number), 0)
            .and_then(|()| self.file.sync_data())
            .map_err(|source| Error::io("write", &self.path, source))
    }

    /// The payload that `blob` names, checked against its header and hash.
    pub(crate) fn read(&self, blob: &BlobRef) -> Result<Vec<u8>> {
        self.check_end(blob)?;
        let mut payload = vec![0; blob.len as usize];
        self.read_sealed(blob, &mut payload)?;
        let Some(cipher) = &self.cipher else { return Ok(payload) };
        let opened = cipher.open(&[blob.kind.code()], &payload);
        opened.map_err(|error| self.lost(blob, &error))
    }

    /// Bytes of the payload that `blob` names.
    pub(crate) fn payload_len(&self, blob: &BlobRef) -> usize {
        let sealed = if self.cipher.is_some() { SEAL_BYTES } else { 0 };
        (blob.len as usize).saturating_sub(sealed)
    }

    /// [`Segment::read`] into `out`, as long as the payload; what is in it after an error is unknown.
    pub(crate) fn read_into(&self, blob: &BlobRef, out: &mut [u8]) -> Result<()> {
        if self.cipher.is_some() {
            out.copy_from_slice(&self.read(blob)?);
            return Ok(());
        }
        self.check_end(blob)?;
        self.read_sealed(blob, out)
    }

    /// [`Segment::read`] where the payload lies, in the system's file cache; in memory of its own where it is encrypted or
    /// the system gives no map. `lock` is that of the store's folder.
    pub(crate) fn map(&self, blob: &BlobRef, lock: &Arc<Lock>) -> Result<PageBytes> {
        let Some(map) = self.mapped(blob, lock) else { return Ok(self.read(blob)?.into()) };
        self.check(blob, &map)?;
        Ok(map.into())
    }

    /// The payload's bytes as they are, mapped; None where a read says more, or is all there is.
    fn mapped(&self, blob: &BlobRef, lock: &Arc<Lock>) -> Option<Mapped> {
        // A map that reaches beyond the file would end the program.
        let is_whole = blob.len > 0 && self.check_end(blob).is_ok();
        if self.cipher.is_some() || !is_whole || !Mapped::has_room() {
            return None;
        }
        let mut options = memmap2::MmapOptions::new();
        options.offset(blob.offset + RECORD_HEADER_BYTES).len(blob.len as usize);
        // SAFETY: while the folder is locked, as it is as long as the map lives, its store alone writes there: never to a
        // record that the database referred to since it was opened, and it cuts no file before the end of one. A file that
        // is removed stays mapped.
        let map = unsafe { options.map(&self.file) }.ok()?;
        can_be_read(&map).then(|| Mapped::new(map, lock))
    }

    fn lost(&self, blob: &BlobRef, why: &dyn std::fmt::Display) -> Error {
        Error::corrupted(format!("read {} at {}: {why}", self.path.display(), blob.offset))
    }

    /// Before anything is allocated for a record: that the file has its bytes.
    fn check_end(&self, blob: &BlobRef) -> Result<()> {
        let end = blob.offset.checked_add(blob.record_bytes());
        let end = end.ok_or_else(|| self.lost(blob, &"no such place"))?;
        if end > self.len()? {
            let why = format!("expected {} bytes, the file is too short", blob.len);
            return Err(self.lost(blob, &why));
        }
        Ok(())
    }

    /// The bytes of the record behind its header into `out`, as many as those, checked against header and hash.
    fn read_sealed(&self, blob: &BlobRef, out: &mut [u8]) -> Result<()> {
        self.read_exact(out, blob.offset + RECORD_HEADER_BYTES)?;
        self.check(blob, out)
    }

    /// That the record's header and its `payload` are those that `blob` names. The header is read apart, so that a payload
    /// of megabytes is not copied once more.
    fn check(&self, blob: &BlobRef, payload: &[u8]) -> Result<()> {
        let mut header = [0; RECORD_HEADER_BYTES as usize];
        self.read_exact(&mut header, blob.offset)?;
        if parse_record_header(&header)? != (blob.kind, blob.len, blob.hash) {
            return Err(self.lost(blob, &"the record is another than the one referred to"));
        }
        if payload_hash(blob.kind, payload) != blob.hash {
            return Err(self.lost(blob, &"checksum does not match"));
        }
        Ok(())
    }

    fn read_exact(&self, out: &mut [u8], offset: u64) -> Result<()> {
        let read = self.file.read_exact_at(out, offset);
        read.map_err(|source| Error::io("read", &self.path, source))
    }

    /// The payload's bytes as they are, damaged or not; zeros where the file ends early.
    fn read_unchecked(&self, blob: &BlobRef) -> Result<Vec<u8>> {
        let start = blob.offset.saturating_add(RECORD_HEADER_BYTES);
        let stored = self.len()?.saturating_sub(start).min(u64::from(blob.len));
        let mut payload = vec![0; blob.len as usize];
        self.read_exact(&mut payload[..stored as usize], start)?;
        Ok(payload)
    }

    /// `len` bytes of the file from `start` on, as they are.
    pub(crate) fn read_raw(&self, start: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_exact(&mut bytes, start)?;
        Ok(bytes)
    }
}

/// Has the system read a map's bytes all at once. False where it cannot, which reading them without would end the program
/// by; a read of the file says why.
fn can_be_read(map: &memmap2::Mmap) -> bool {
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::PopulateRead) {
        // A kernel before 5.14 does not know the call.
        return error.kind() == std::io::ErrorKind::InvalidInput;
    }
    let _ = map;
    true
}

/// The segment files of a store, and the place where the next record goes.
#[derive(Debug)]
pub(crate) struct Appender {
    folder: PathBuf,
    /// Seals the payloads of an encrypted store.
    cipher: Option<Arc<Cipher>>,
    next_number: u32,
    active: Option<Arc<Segment>>,
    /// Where the active segment's records end, those in `buffer` included.
    end: u64,
    /// What is not written yet: the bytes before `end`.
    buffer: Vec<u8>,
    /// Segments made since the last [`finish`](Self::finish) or [`abandon`](Self::abandon).
    created: Vec<Arc<Segment>>,
    /// The active segment's number and end at that time.
    mark: (u32, u64),
}

impl Appender {
    /// Opens the segments in `folder`; nothing is appended to any of them until [`resume`](Self::resume).
    pub(crate) fn open(
        folder: &Path,
        cipher: Option<&Arc<Cipher>>,
    ) -> Result<(Self, BTreeMap<u32, Arc<Segment>>)> {
        std::fs::create_dir_all(folder).map_err(|source| Error::io("create", folder, source))?;
        let entries =
            std::fs::read_dir(folder).map_err(|source| Error::io("read", folder, source))?;
        let mut segments = BTreeMap::new();
        for entry in entries {
            let entry = entry.map_err(|source| Error::io("read", folder, source))?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".seg")?.parse().ok());
            let Some(number) = number else { continue };
            segments.insert(number, Arc::new(Segment::open(folder, number, cipher.cloned())?));
        }
        let next_number = segments.last_key_value().map_or(1, |(number, _)| number + 1);
        let appender = Self {
            folder: folder.to_owned(),
            cipher: cipher.cloned(),
            next_number,
            active: None,
            end: 0,
            buffer: Vec::new(),
            created: Vec::new(),
            mark: (0, 0),
        };
        Ok((appender, segments))
    }

    /// Goes on in `segment` after `end`; what lies behind is referred to by nothing and is cut off.
    pub(crate) fn resume(&mut self, segment: Arc<Segment>, end: u64) -> Result<()> {
        let is_longer = segment.len()? > end;
        segment.file.set_len(end).map_err(|source| Error::io("truncate", &segment.path, source))?;
        if is_longer {
            // It may hold what was erased: a power loss would bring it back after the erasure counts as done.
            segment.file.sync_all().map_err(|source| Error::io("sync", &segment.path, source))?;
        }
        self.mark = (segment.number, end);
        (self.active, self.end) = (Some(segment), end);
        Ok(())
    }

    /// Number of the segment that grows.
    pub(crate) fn active(&self) -> Option<u32> {
        self.active.as_ref().map(|segment| segment.number)
    }

    /// The next record starts a new segment.
    pub(crate) fn seal(&mut self) {
        self.active = None;
    }

    /// Appends a record; it is on the disk after [`finish`](Self::finish).
    pub(crate) fn append(&mut self, kind: Kind, payload: &[u8]) -> Result<BlobRef> {
        self.append_parts(kind, &[payload])
    }

    /// [`Appender::append`] of a payload that lies in parts.
    pub(crate) fn append_parts(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<BlobRef> {
        let Some(cipher) = &self.cipher else {
            return self.append_as(kind, parts, parts_hash(kind, parts));
        };
        let sealed = cipher.seal(&[kind.code()], &parts.concat())?;
        self.append_as(kind, &[&sealed], payload_hash(kind, &sealed))
    }

    /// Appends the record that `blob` names in `segment`; a damaged one stays as damaged as it was.
    pub(crate) fn copy(&mut self, segment: &Segment, blob: &BlobRef) -> Result<BlobRef> {
        let payload = segment.read_unchecked(blob)?;
        self.append_as(blob.kind, &[&payload], blob.hash)
    }

    fn append_as(&mut self, kind: Kind, parts: &[&[u8]], hash: u64) -> Result<BlobRef> {
        let num_bytes: usize = parts.iter().map(|part| part.len()).sum();
        let len = match u32::try_from(num_bytes) {
            Ok(len) if num_bytes <= MAX_PAYLOAD_BYTES => len,
            _ => {
                return Err(Error::invalid(format!(
                    "append: expected at most {MAX_PAYLOAD_BYTES} bytes in one record, got {num_bytes}"
                )));
            }
        };
        let record_bytes = RECORD_HEADER_BYTES + u64::from(len);
        let full = self.end > SEGMENT_HEADER_BYTES && self.end + record_bytes > SEGMENT_BYTES;
        if full {
            self.write_buffer()?;
            self.sync()?;
            self.active = None;
        }
        let segment = match &self.active {
            Some(segment) => segment.number,
            None => self.create()?,
        };
        let blob = BlobRef { segment, offset: self.end, len, hash, kind };
        self.buffer.extend_from_slice(&record_header(kind, len, hash));
        parts.iter().for_each(|part| self.buffer.extend_from_slice(part));
        self.end += record_bytes;
        if self.buffer.len() >= BUFFER_BYTES {
            self.write_buffer()?;
        }
        Ok(blob)
    }

    /// Makes every appended record durable; returns the segments that were created meanwhile.
    pub(crate) fn finish(&mut self) -> Result<Vec<Arc<Segment>>> {
        self.write_buffer()?;
        self.sync()?;
        if !self.created.is_empty() {
            sync_folder(&self.folder)?;
        }
        self.mark = (self.active().unwrap_or(0), self.end);
        Ok(std::mem::take(&mut self.created))
    }

    /// Forgets what was appended since the last [`finish`](Self::finish).
    pub(crate) fn abandon(&mut self) {
        self.buffer.clear();
        let (number, end) = self.mark;
        let kept = self.active.take().filter(|segment| segment.number == number);
        if let Some(segment) = kept {
            // A longer file does no harm: its tail is overwritten next, or cut off at the next open.
            let _ = segment.file.set_len(end);
            self.end = end;
            self.active = Some(segment);
        }
        if let Some(first) = self.created.first() {
            // Their numbers were never given: `succeed` would take one of them for the last.
            self.next_number = first.number;
        }
        for segment in self.created.drain(..) {
            // Nothing refers to it; if it stays, the next segment of its number or the next open replaces it.
            let _ = std::fs::remove_file(&segment.path);
        }
    }

    /// Begins a segment if `number` is the last one that was given: once that segment is removed nothing else would say so,
    /// and the next opening would give its number again. True if it did; it lasts from [`finish`](Self::finish) on.
    pub(crate) fn succeed(&mut self, number: u32) -> Result<bool> {
        let is_last = number + 1 == self.next_number;
        if is_last {
            self.write_buffer()?;
            self.sync()?;
            self.create()?;
        }
        Ok(is_last)
    }

    /// Removes a segment's file; the bytes stay readable through handles that are open.
    pub(crate) fn remove(&self, segment: &Segment) -> Result<()> {
        std::fs::remove_file(&segment.path)
            .map_err(|source| Error::io("remove", &segment.path, source))?;
        sync_folder(&self.folder)
    }

    fn create(&mut self) -> Result<u32> {
        let number = self.next_number;
        let segment = Arc::new(Segment::create(&self.folder, number, self.cipher.clone())?);
        self.next_number += 1;
        self.created.push(segment.clone());
        (self.active, self.end) = (Some(segment), SEGMENT_HEADER_BYTES);
        Ok(number)
    }

    fn write_buffer(&mut self) -> Result<()> {
        if let Some(segment) = &self.active {
            let at = self.end - self.buffer.len() as u64;
            segment
                .file
                .write_all_at(&self.buffer, at)
                .map_err(|source| Error::io("write", &segment.path, source))?;
        }
        self.buffer.clear();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let Some(segment) = &self.active else { return Ok(()) };
        segment.file.sync_data().map_err(|source| Error::io("sync", &segment.path, source))
    }
}

/// Makes the creation and removal of files in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(|source| Error::io("sync", folder, source))
}

fn file_path(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("{number:06}.seg"))
}
