//! Jobs in processes apart: one for each, or one after the other in a process that stays.
//! Knows nothing of what a job does.
//!
//! A job goes in as a line of JSON and its outcome, or what went wrong, comes out as one.

use super::{Job, Outcome, Result, Scratch, run};
use mka::{Engine, ModelSource};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Runs `job` in a new process of this program with `threads` threads (0: all cores).
pub(crate) fn spawn(job: &Job, threads: usize) -> Result<Outcome> {
    let mut worker = Worker::start(threads, false)?;
    let sent = worker.send(job);
    drop(worker.input.take());
    let received = worker.receive();
    let output = worker.child.wait_with_output()?;
    // A process that ends early breaks the pipe too: what it says itself is the cause.
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("job: {}: {}", output.status, said.trim()).into());
    }
    sent.and(received)
}

/// Runs `job` in the process that does this thread's jobs, which is started with the first one and ends with the thread.
/// What a CUDA device and its driver need of time at the start of a process is taken once.
pub(crate) fn spawn_kept(job: &Job, threads: usize) -> Result<Outcome> {
    thread_local! {
        static WORKER: RefCell<Option<Kept>> = const { RefCell::new(None) };
    }
    WORKER.with_borrow_mut(|kept| {
        let worker = match kept {
            Some(worker) => worker,
            None => kept.insert(Kept(Worker::start(threads, true)?)),
        };
        let outcome = worker.0.send(job).and_then(|()| worker.0.receive());
        if worker.0.is_broken {
            *kept = None;
        }
        outcome
    })
}

/// A process that does jobs.
struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// Whether nothing more can be asked of it.
    is_broken: bool,
}

impl Worker {
    fn start(threads: usize, stays: bool) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("job").stdin(Stdio::piped()).stdout(Stdio::piped());
        match stays {
            // It says what goes wrong with a job where its outcome would be.
            true => command.arg("--stay").stderr(Stdio::inherit()),
            false => command.stderr(Stdio::piped()),
        };
        if threads > 0 {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        let mut child = command.spawn()?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or("job: no standard output")?;
        Ok(Self { child, input, output: BufReader::new(output), is_broken: false })
    }

    fn send(&mut self, job: &Job) -> Result<()> {
        let mut line = serde_json::to_vec(job)?;
        line.push(b'\n');
        self.is_broken = true;
        let input = self.input.as_mut().ok_or("job: no standard input")?;
        input.write_all(&line).map_err(|e| format!("job: the process takes no more: {e}"))?;
        self.is_broken = false;
        Ok(())
    }

    fn receive(&mut self) -> Result<Outcome> {
        let mut line = String::new();
        self.is_broken = self.output.read_line(&mut line)? == 0;
        if self.is_broken {
            return Err("job: the process ended before its job".into());
        }
        let outcome: Result<Outcome, String> = serde_json::from_str(&line)?;
        Ok(outcome.map_err(|error| format!("job: {error}"))?)
    }
}

/// A process that ends when this is dropped.
struct Kept(Worker);

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.0.input.take());
        // One that cannot be waited for has ended.
        let _ = self.0.child.wait();
    }
}

/// The other side: does the jobs of standard input, one after the other. With `stays` the device of the first one stays
/// open until the last.
pub(crate) fn serve(stays: bool) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build()?;
    let mut anchor = None;
    for line in std::io::stdin().lock().lines() {
        let job: Job = serde_json::from_str(&line?)?;
        if stays && anchor.is_none() {
            anchor = Some(Anchor::open(&job)?);
        }
        super::forget_peak_rss();
        let outcome = runtime.block_on(run(&job)).map_err(|error| error.to_string());
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
        out.flush()?;
    }
    Ok(())
}

/// An engine that is asked nothing: while it is open, so is its device.
struct Anchor {
    _engine: Engine,
    /// Its empty store.
    _scratch: Scratch,
}

impl Anchor {
    fn open(job: &Job) -> Result<Self> {
        let scratch = Scratch::new("anchor")?;
        let store = scratch.path().join("store");
        let mut builder =
            Engine::builder(store).model(job.model.parse::<ModelSource>()?).quiet(true);
        if let Some(device) = job.named_device() {
            builder = builder.device(device.parse()?);
        }
        Ok(Self { _engine: builder.open_blocking()?, _scratch: scratch })
    }
}
