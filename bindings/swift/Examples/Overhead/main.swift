// What a token, a recall and a cancel cost from Swift: `Overhead MODEL [TOKENS]` prints microseconds; Rust and Python have twins.
// Knows the public API only.

import Foundation
import MKA

let model = URL(fileURLWithPath: CommandLine.arguments[1])
let maxNewTokens = CommandLine.arguments.count > 2 ? UInt64(CommandLine.arguments[2])! : 2000
let folder = FileManager.default.temporaryDirectory.appendingPathComponent("mka-overhead-\(UUID())")
defer { try? FileManager.default.removeItem(at: folder) }
let engine = try await Engine.open(
    at: folder, model: .path(model), options: EngineOptions(device: "cpu", windowTokens: 128))
let chat = try await engine.session(user: "ada", session: "trip")

func since(_ start: ContinuousClock.Instant) -> Double {
    let spent = ContinuousClock.now - start
    return Double(spent.components.seconds) * 1e6 + Double(spent.components.attoseconds) / 1e12
}

/// CPU time of all threads so far, microseconds.
func processTime() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
    return Double(time.tv_sec) * 1e6 + Double(time.tv_nsec) / 1e3
}

/// CPU time so far of the threads that are not the library's, microseconds: what Swift itself costs. Nil where the system
/// does not tell threads apart.
func languageTime() -> Double? {
    let tasks = "/proc/self/task"
    guard let threads = try? FileManager.default.contentsOfDirectory(atPath: tasks) else { return nil }
    var nanoseconds = 0.0
    for thread in threads {
        // A thread that has ended meanwhile has no files.
        guard let name = try? String(contentsOfFile: "\(tasks)/\(thread)/comm", encoding: .utf8),
            let spent = try? String(contentsOfFile: "\(tasks)/\(thread)/schedstat", encoding: .utf8)
        else { continue }
        if !name.hasPrefix("mka-") { nanoseconds += Double(spent.prefix { $0 != " " }) ?? 0 }
    }
    return nanoseconds / 1e3
}

/// What was spent so far. Of a stream it starts with the first token: what a turn costs once is not a token's.
struct Clock {
    let wall = ContinuousClock.now
    let cpu = processTime()
    let own = languageTime()

    func print(_ name: String, _ tokens: Int) {
        let (wall, spent) = (since(wall) / Double(tokens), (processTime() - cpu) / Double(tokens))
        let swift = own.flatMap { own in languageTime().map { "\(($0 - own) / Double(tokens))" } } ?? "an unknown part"
        Swift.print("\(name): \(wall) us a token, \(spent) of CPU time, \(swift) of it Swift's, \(tokens) tokens")
    }
}

/// Reads one answer where tasks run.
func read(_ chat: Session, _ name: String) async throws {
    var (clock, tokens): (Clock?, Int) = (nil, 0)
    for try await event in chat.send("go on", options: SendOptions(maxNewTokens: maxNewTokens, recallK: 0)) {
        if clock == nil { clock = Clock() } else if case .token = event { tokens += 1 }
    }
    clock?.print(name, tokens)
}

/// Reads one answer on the main thread.
@MainActor func readOnMain(_ chat: Session, _ name: String) async throws {
    var (clock, tokens): (Clock?, Int) = (nil, 0)
    for try await event in chat.send("go on", options: SendOptions(maxNewTokens: maxNewTokens, recallK: 0)) {
        if clock == nil { clock = Clock() } else if case .token = event { tokens += 1 }
    }
    clock?.print(name, tokens)
}

/// Whom a thread wakes, over and over.
final class Ticks: @unchecked Sendable {
    private let lock = NSLock()
    private var task: UnsafeContinuation<Void, Never>?

    /// Named as one of the library's, so that its time is not Swift's; it ends with the process.
    func start() {
        Thread.detachNewThread {
            Thread.current.name = "mka-ticks"
            while true {
                usleep(300)
                let waking = self.lock.withLock {
                    defer { self.task = nil }
                    return self.task
                }
                waking?.resume()
            }
        }
    }

    func wait() async {
        await withUnsafeContinuation { task in lock.withLock { self.task = task } }
    }
}

/// What an AsyncThrowingStream takes on the main thread for an element that another thread announces, to compare with.
@MainActor func streamAlone(_ elements: Int) async throws {
    let ticks = Ticks()
    ticks.start()
    let stream = AsyncThrowingStream<Int, any Error> {
        await ticks.wait()
        return 1
    }
    var (clock, seen): (Clock?, Int) = (nil, 0)
    for try await one in stream {
        if clock == nil { clock = Clock() } else { seen += one }
        if seen == elements { break }
    }
    clock?.print("main thread, a stream alone", seen)
}

for run in 0..<3 { try await read(chat, "run \(run)") }
for run in 0..<3 { try await readOnMain(chat, "main thread, run \(run)") }
try await streamAlone(50)
let before = try chat.numTurns
var seen = 0
for try await event in chat.send("tell me a long story", options: SendOptions(maxNewTokens: maxNewTokens, recallK: 0)) {
    if case .token = event { seen += 1 }
    if seen == 5 { break }
}
let left = ContinuousClock.now
let chosen = chat.generatedTokens
// A stream that was left holds its session until the model has stopped.
_ = try await chat.send("go on", options: SendOptions(maxNewTokens: 1, recallK: 0)).text()
let stopped = since(left)
let turns = try await engine.memory.turns(user: "ada", session: "trip", range: before + 1..<before + 2)
print("cancelled at token \(seen): \(chosen) chosen then, \(turns[0].numTokens) kept, \(stopped) us until the next turn was done")
for facts in [8, 500, 10_000] {
    let owner = "owner of \(facts)"
    try await engine.memory.remember(
        (0..<facts).map { NewTurn("Fact \($0): the number of thing \($0 % 37) is \($0 * 7).") }, user: owner,
        session: "facts")
    // A thousand recalls; the least of twenty runs is what other work on the machine disturbs least.
    var (least, read) = (Double.infinity, 0.0)
    for _ in 0..<20 {
        let start = ContinuousClock.now
        for i in 0..<50 {
            // An agent reads text and score of what it is given.
            for hit in try await engine.memory.recall("number of thing \(i % 37)", user: owner) {
                read += Double(hit.text.utf8.count) + Double(hit.score)
            }
        }
        least = min(least, since(start) / 50)
    }
    precondition(read > 0)
    print("\(least) us a recall among \(facts) facts, the least of 20 runs of 50")
}
try await engine.close()
