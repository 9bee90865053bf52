//! A disk that lies: this binary's own `pwrite`, `fsync` and their like stand between the library and the kernel.
//! Knows nothing of stores; it watches the files below one folder, and ends the process in a write of its choice.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a drive writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// Where the process dies, and what is left then.
#[derive(Debug, Clone)]
pub(crate) struct Crash {
    /// The write in which it dies, from 0; a part of it reaches the file.
    pub(crate) at_write: u64,
    /// Of every choice.
    pub(crate) seed: u64,
    /// What was not synced goes, sector by sector as chance has it, and so do new files whose folder was not synced.
    pub(crate) power_loss: bool,
}

impl Crash {
    pub(crate) fn encode(&self) -> String {
        format!("{} {} {}", self.at_write, self.seed, self.power_loss)
    }

    pub(crate) fn decode(text: &str) -> Self {
        let mut parts = text.split(' ');
        let mut next = || parts.next().unwrap();
        Self {
            at_write: next().parse().unwrap(),
            seed: next().parse().unwrap(),
            power_loss: next().parse().unwrap(),
        }
    }
}

/// What a file held before a write that was not synced yet.
struct Undo {
    offset: u64,
    old: Vec<u8>,
    old_len: u64,
}

struct Disk {
    folder: PathBuf,
    crash: Crash,
    num_writes: u64,
    rng: ChaCha8Rng,
    /// Writes that were not synced, by file.
    unsynced: HashMap<PathBuf, Vec<Undo>>,
    /// New files whose folder was not synced.
    created: Vec<PathBuf>,
}

static DISK: OnceLock<Mutex<Disk>> = OnceLock::new();

/// Watches the files below `folder` from now on.
pub(crate) fn arm(folder: &Path, crash: Crash) {
    let rng = ChaCha8Rng::seed_from_u64(crash.seed);
    let (folder, num_writes) = (folder.canonicalize().unwrap(), 0);
    let (unsynced, created) = (HashMap::new(), Vec::new());
    let disk = Disk { folder, crash, num_writes, rng, unsynced, created };
    assert!(DISK.set(Mutex::new(disk)).is_ok());
}

pub(crate) fn num_writes() -> u64 {
    DISK.get().unwrap().lock().unwrap().num_writes
}

/// The disk and the path of `fd`, if it is a watched file or folder.
fn watched(fd: c_int) -> Option<(MutexGuard<'static, Disk>, PathBuf)> {
    let disk = DISK.get()?;
    let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
    path.starts_with(&disk.folder).then_some((disk, path))
}

fn len_of(fd: c_int) -> u64 {
    // SAFETY: `stat` is plain data of the size that the call expects.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(fd, &mut stat) == 0 { stat.st_size as u64 } else { 0 }
    }
}

fn read_at(fd: c_int, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; len];
    // SAFETY: the buffer has `len` bytes. Files opened for writing alone cannot be read: then nothing is undone.
    let read = unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), len, offset as libc::off_t) };
    bytes.truncate(read.max(0) as usize);
    bytes
}

fn raw_pwrite(fd: c_int, bytes: &[u8], offset: u64) -> isize {
    // SAFETY: the slice is valid for its length.
    unsafe { libc::syscall(libc::SYS_pwrite64, fd, bytes.as_ptr(), bytes.len(), offset) as isize }
}

fn raw_truncate(fd: c_int, len: u64) -> c_int {
    // SAFETY: no memory is passed.
    unsafe { libc::syscall(libc::SYS_ftruncate, fd, len) as c_int }
}

impl Disk {
    /// Notes what `len` bytes at `offset` were; true if the process is to die in this write.
    fn note(&mut self, fd: c_int, path: &Path, offset: u64, len: usize) -> bool {
        let old = read_at(fd, offset, len);
        let undo = Undo { offset, old, old_len: len_of(fd) };
        self.unsynced.entry(path.to_owned()).or_default().push(undo);
        let dies = self.num_writes == self.crash.at_write;
        self.num_writes += 1;
        dies
    }

    fn die(&mut self) -> ! {
        if self.crash.power_loss {
            for (path, undos) in std::mem::take(&mut self.unsynced) {
                self.lose(&path, undos);
            }
            for path in std::mem::take(&mut self.created) {
                if self.rng.random_bool(0.5) {
                    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
                    // SAFETY: the path ends with a zero.
                    unsafe { libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, path.as_ptr(), 0) };
                }
            }
        }
        // SAFETY: ends the process without running anything of it.
        unsafe {
            libc::syscall(libc::SYS_exit_group, 137);
        }
        unreachable!("the process has ended")
    }

    /// Takes unsynced writes of a file back, each sector as chance has it, the newest write first.
    fn lose(&mut self, path: &Path, undos: Vec<Undo>) {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path ends with a zero.
        let fd = unsafe {
            libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDWR, 0) as c_int
        };
        if fd < 0 {
            return;
        }
        // All goes, all stays, or each sector for itself.
        let chance = [1.0, 0.0, 0.5][self.rng.random_range(0..3)];
        let oldest_len = undos.first().map(|undo| undo.old_len);
        for undo in undos.iter().rev() {
            // A shorter length is a write to the file's metadata: it is lost as a whole, and the old tail is back.
            if len_of(fd) < undo.offset + undo.old.len() as u64 {
                if self.rng.random_bool(chance) {
                    raw_pwrite(fd, &undo.old, undo.offset);
                }
                continue;
            }
            let mut at = 0;
            while at < undo.old.len() {
                let sector_end = SECTOR_BYTES - (undo.offset as usize + at) % SECTOR_BYTES;
                let end = (at + sector_end).min(undo.old.len());
                if self.rng.random_bool(chance) {
                    raw_pwrite(fd, &undo.old[at..end], undo.offset + at as u64);
                }
                at = end;
            }
        }
        // The new length is a write of its own, to the file's metadata.
        if let Some(len) = oldest_len.filter(|len| *len < len_of(fd)) {
            if self.rng.random_bool(chance) {
                raw_truncate(fd, len);
            } else {
                // It is there, but what lies behind the old end may not be.
                for at in (len..len_of(fd)).step_by(SECTOR_BYTES) {
                    if self.rng.random_bool(chance) {
                        let end = (at + SECTOR_BYTES as u64).min(len_of(fd));
                        raw_pwrite(fd, &vec![0; (end - at) as usize], at);
                    }
                }
            }
        }
    }
}

fn write_or_die(fd: c_int, bytes: &[u8], offset: u64) -> Option<isize> {
    let (mut disk, path) = watched(fd)?;
    if disk.note(fd, &path, offset, bytes.len()) {
        let part = disk.rng.random_range(0..=bytes.len());
        raw_pwrite(fd, &bytes[..part], offset);
        disk.die();
    }
    Some(raw_pwrite(fd, bytes, offset))
}

fn truncate_or_die(fd: c_int, len: i64) -> c_int {
    if let Some((mut disk, path)) = watched(fd) {
        let len = len as u64;
        let tail = len_of(fd).saturating_sub(len) as usize;
        if disk.note(fd, &path, len, tail) {
            disk.die();
        }
    }
    raw_truncate(fd, len as u64)
}

fn synced(fd: c_int) {
    if let Some((mut disk, path)) = watched(fd) {
        disk.unsynced.remove(&path);
        disk.created.retain(|file| file.parent() != Some(path.as_path()));
    }
}

// What follows takes the place of the C library's functions in this binary.
// SAFETY, for all: arguments and results are those of the functions that they stand in for, and the kernel gets them as
// they came, but for the write in which the process dies.

mod symbols {
    use super::*;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn pwrite64(fd: c_int, buf: *const c_void, len: usize, offset: i64) -> isize {
        // SAFETY: see above.
        let bytes = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), len) };
        write_or_die(fd, bytes, offset as u64)
            .unwrap_or_else(|| raw_pwrite(fd, bytes, offset as u64))
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn write(fd: c_int, buf: *const c_void, len: usize) -> isize {
        // SAFETY: see above.
        let bytes = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), len) };
        if DISK.get().is_some() && fd > 2 && watched(fd).is_some() {
            // SAFETY: no memory is passed.
            let offset = unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) };
            if let Some(written) = write_or_die(fd, bytes, offset as u64) {
                // SAFETY: no memory is passed.
                unsafe { libc::lseek(fd, written as i64, libc::SEEK_CUR) };
                return written;
            }
        }
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_write, fd, buf, len) as isize }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn ftruncate64(fd: c_int, len: i64) -> c_int {
        truncate_or_die(fd, len)
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn fsync(fd: c_int) -> c_int {
        // SAFETY: no memory is passed.
        let done = unsafe { libc::syscall(libc::SYS_fsync, fd) as c_int };
        synced(fd);
        done
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
        // SAFETY: no memory is passed.
        let done = unsafe { libc::syscall(libc::SYS_fdatasync, fd) as c_int };
        synced(fd);
        done
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
        // SAFETY: see above; the path ends with a zero.
        let (name, is_new) = unsafe {
            let exists = libc::syscall(libc::SYS_faccessat, libc::AT_FDCWD, path, libc::F_OK) == 0;
            (CStr::from_ptr(path), flags & libc::O_CREAT != 0 && !exists)
        };
        if is_new && let Some(disk) = DISK.get() {
            let path = PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes()));
            let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
            if path.starts_with(&disk.folder) {
                disk.created.push(path);
            }
        }
        // SAFETY: see above.
        unsafe {
            libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags | libc::O_LARGEFILE, mode)
                as c_int
        }
    }
}
