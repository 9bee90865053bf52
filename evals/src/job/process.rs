//! Jobs in processes apart: one for each, or one after the other in a process that stays.
//! Knows nothing of what a job does.
//!
//! A job goes in as a line of JSON and its outcome, or what went wrong, comes out as one.

use super::{Job, Outcome, Result, run};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Runs `job` in a new process of this program with `threads` threads (0: all cores).
pub(crate) fn spawn(job: &Job, threads: usize) -> Result<Outcome> {
    let mut command = command(threads)?;
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let line = line_of(job)?;
    // Its end is closed with this, and what it says on both ways out is read at once.
    let sent = child.stdin.take().map(|mut input| input.write_all(&line));
    let output = child.wait_with_output()?;
    // A process that ends early breaks the pipe too: what it says itself is the cause.
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("job: {}: {}", output.status, said.trim()).into());
    }
    sent.ok_or("job: no standard input")??;
    let outcome = outcome_of(&String::from_utf8_lossy(&output.stdout));
    Ok(outcome.map_err(|error| format!("{error} {}", said.trim()))?)
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
            None => kept.insert(Kept::start(threads)?),
        };
        let outcome = worker.run(job);
        if outcome.is_err() {
            // What went wrong may have left its device, or what is on its way out, in no state to go on with.
            *kept = None;
        }
        outcome
    })
}

/// This program as a process that does jobs.
fn command(threads: usize) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("job").stdin(Stdio::piped()).stdout(Stdio::piped());
    if threads > 0 {
        command.env("RAYON_NUM_THREADS", threads.to_string());
    }
    Ok(command)
}

fn line_of(job: &Job) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(job)?;
    line.push(b'\n');
    Ok(line)
}

fn outcome_of(line: &str) -> Result<Outcome> {
    let outcome: Result<Outcome, String> =
        serde_json::from_str(line).map_err(|e| format!("job: {e}: {line:?}"))?;
    Ok(outcome.map_err(|error| format!("job: {error}"))?)
}

/// A process that does one job after the other and ends when this is dropped.
struct Kept {
    child: Child,
    /// None once it is to end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Kept {
    fn start(threads: usize) -> Result<Self> {
        // It says what goes wrong with a job where its outcome would be.
        let mut child = command(threads)?.spawn()?;
        let input = child.stdin.take();
        let output = child.stdout.take().ok_or("job: no standard output")?;
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    fn run(&mut self, job: &Job) -> Result<Outcome> {
        let input = self.input.as_mut().ok_or("job: no standard input")?;
        input
            .write_all(&line_of(job)?)
            .map_err(|e| format!("job: the process takes no more: {e}"))?;
        let mut line = String::new();
        match self.output.read_line(&mut line)? {
            0 => Err("job: the process ended before its job".into()),
            _ => outcome_of(&line),
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.input.take());
        // One that cannot be waited for has ended.
        let _ = self.child.wait();
    }
}

/// The other side: does the jobs of standard input, one after the other. A CUDA device that one of them used stays open
/// until the last: the kernels that were loaded hold it.
pub(crate) fn serve() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build()?;
    for line in std::io::stdin().lock().lines() {
        let job: Job = serde_json::from_str(&line?)?;
        super::forget_peak_rss();
        let outcome = runtime.block_on(run(&job));
        let outcome = outcome.map_err(|error| super::described(error.as_ref()));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
        out.flush()?;
    }
    Ok(())
}
