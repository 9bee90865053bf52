// The package over the tiny seeded model: turns, cancelling, errors, memory, many tasks.
// The repository is found through this file's path.

import Foundation
import MKA
import Testing

let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().deletingLastPathComponent().deletingLastPathComponent()
/// A model of two layers with a byte vocabulary and a chat template, trained on 256 tokens.
let tinyModel = root.appendingPathComponent("engine/tests/data/golden/gguf/model.gguf")

/// A folder of its own for each test, removed when it is done.
final class Folder: Sendable {
    let url = FileManager.default.temporaryDirectory.appendingPathComponent("mka-\(UUID())")
    var store: URL { url.appendingPathComponent("store.mka") }

    init() throws {
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }

    deinit {
        try? FileManager.default.removeItem(at: url)
    }

    func engine(model: ModelSource? = .path(tinyModel)) async throws -> Engine {
        try await Engine.open(
            at: store, model: model,
            options: EngineOptions(device: "cpu", windowTokens: 128, blockTokens: 64))
    }
}

/// The error that `work` throws.
func failure<T>(_ work: () async throws -> T) async -> MKAError? {
    do {
        _ = try await work()
        return nil
    } catch {
        return error as? MKAError
    }
}

func short(_ tokens: UInt64) -> SendOptions { SendOptions(maxNewTokens: tokens) }

@Test func aTurnStreamsItsAnswerAndSaysWhatItCost() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    var answer = ""
    var usage: Usage?
    for try await event in chat.send("hello there", options: short(6)) {
        switch event {
        case .token(let token): answer += token.text
        case .done(let done): usage = done
        case .recalled: break
        }
    }
    let first = try #require(usage)
    #expect(first.generatedTokens <= 6 && first.reusedTokens == 0 && first.answerTurn == 1)
    let again = try await chat.regenerate(options: short(6)).text()
    #expect(again.text == answer && again.usage.reusedTokens > 0 && again.usage.answerTurn == 2)
    #expect(try chat.numTurns == 3)
    #expect(chat.scope == Scope(user: "ada", agent: nil, session: "trip"))
    #expect(try engine.countTokens("hello") == 5)
    #expect(try engine.modelName == "model.gguf")
    #expect(try engine.device == "cpu" && availableDevices().contains("cpu"))
    #expect(try engine.trainedTokens == 256)
    #expect(version.split(separator: ".").count == 3)
    try await engine.close()
}

@Test func aModelIsNamedAlikeInTheCallAndInTheOptions() async throws {
    let given: [ModelSource] = [.hub("owner/name"), .path(tinyModel), .named("owner/name")]
    let expected: [ModelSource] = [.hub(id: "owner/name"), .path(path: tinyModel.path), .named(name: "owner/name")]
    #expect(given == expected)
    let folder = try Folder()
    let options = EngineOptions(model: .path(tinyModel), device: "cpu", windowTokens: 128)
    let engine = try await Engine.open(at: folder.store, options: options)
    #expect(try engine.modelName == "model.gguf")
    try await engine.close()
    let missing = EngineOptions(model: .named(folder.url.appendingPathComponent("none.gguf").path))
    #expect(await failure { try await Engine.open(at: folder.store, options: missing) }?.message.contains("none.gguf") == true)
}

@Test func aReopenedSessionContinuesBitForBit() async throws {
    let folder = try Folder()
    var logits: [[Float]] = []
    for round in 0..<2 {
        let engine = try await folder.engine()
        let chat = try await engine.session(user: "ada", session: "trip")
        if round == 0 {
            _ = try await chat.send("the one", options: short(4)).text()
            let text = String(repeating: "the end and the beginning. ", count: 40)
            _ = try await chat.feed(text, options: FeedOptions(mode: .model)).finish()
        }
        logits.append(try await chat.peekLogits("the next"))
        try await engine.close()
    }
    #expect(logits[0] == logits[1] && logits[0].count > 200)
}

@Test func aSessionIsTakenBackToAnEarlierTurn() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    for message in ["the cat is red", "the dog is blue"] {
        _ = try await chat.send(message, options: short(4)).text()
    }
    try await chat.rewind(to: 2)
    let turns = try await engine.memory.turns(user: "ada", session: "trip")
    #expect(turns.map(\.retracted) == [false, false, true, true])
    #expect(await failure { try await chat.rewind(to: 5) }?.kind == .notFound)
    _ = try await chat.regenerate(options: short(4)).text()
    #expect(try chat.numTurns == 5)
    try await engine.close()
}

@Test func aForkGoesOnAsItsOriginalAndThenItsOwnWay() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    _ = try await chat.send("the cat is red", options: short(4)).text()
    let fork = try await chat.fork(session: "other")
    #expect(fork.scope.session == "other")
    let (left, right) = (try await chat.peekLogits("the next"), try await fork.peekLogits("the next"))
    #expect(left == right && !left.isEmpty)
    _ = try await fork.send("the dog is blue", options: short(4)).text()
    #expect(try fork.numTurns == 4)
    #expect(try chat.numTurns == 2)
    #expect(await failure { try await chat.fork(session: "trip") }?.kind == .invalidArgument)
    try await engine.close()
    #expect(await failure { try await fork.fork(session: "third") } != nil)
}

@Test func leavingTheLoopCancelsAndTheSessionGoesOn() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    for try await event in chat.send("tell me", options: short(1_000_000)) {
        if case .token = event { break }
    }
    _ = try await chat.send("go on", options: short(2)).text()
    let turns = try await engine.memory.turns(user: "ada", session: "trip")
    #expect(turns.map(\.role) == [.user, .assistant, .user, .assistant])
    #expect(!turns[1].text.isEmpty && turns[1].numTokens < 1000)
    try await engine.close()
}

@Test func cancellingTheTaskStopsTheModelAndKeepsTheStoreConsistent() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    let task = Task {
        var seen: UInt64 = 0
        do {
            for try await event in chat.send("tell me", options: short(10_000_000)) {
                if case .token = event { seen += 1 }
            }
            return (seen, false)
        } catch is CancellationError {
            return (seen, true)
        }
    }
    try await Task.sleep(for: .milliseconds(200))
    task.cancel()
    let (seen, cancelled) = try await task.value
    #expect(cancelled || seen > 0)
    _ = try await chat.send("go on", options: short(2)).text()
    let turns = try await engine.memory.turns(user: "ada", session: "trip")
    #expect(turns.count == 4)
    // What was generated and not seen is at most what was on its way.
    #expect(turns[1].numTokens <= seen + 66)
    try await engine.close()
}

/// Models to cancel: the tiny one, and the default one, whose token takes longer than anything else, where it is in the cache.
func models() -> [URL] {
    let cache = ProcessInfo.processInfo.environment["MKA_CACHE"] ?? NSHomeDirectory() + "/.cache/mka"
    let model = URL(fileURLWithPath: cache + "/models/SmolLM2-135M-Instruct-Q4_1.gguf")
    if FileManager.default.fileExists(atPath: model.path) { return [tinyModel, model] }
    print("the default model is not in \(cache): only the tiny one is cancelled")
    return [tinyModel]
}

@Test(arguments: models())
func afterACancelTheModelChoosesAtMostOneMoreToken(model: URL) async throws {
    let folder = try Folder()
    let engine = try await folder.engine(model: .path(model))
    let chat = try await engine.session(user: "ada", session: "trip")
    // By leaving the loop, and by cancelling the task that waits for the next token: the tiny model's comes too fast to wait.
    for byTask in model == tinyModel ? [false] : [false, true] {
        let before = try chat.numTurns
        var chosen: UInt64 = 0
        if byTask {
            let (said, saying) = AsyncStream.makeStream(of: Void.self)
            let task = Task {
                for try await _ in chat.send("Tell me a very long story.", options: short(100_000)) {
                    saying.yield()
                }
            }
            var seen = 0
            for await _ in said {
                seen += 1
                if seen == 5 { break }
            }
            task.cancel()
            chosen = chat.generatedTokens
            _ = try? await task.value
        } else {
            var seen = 0
            for try await _ in chat.send("Tell me a very long story.", options: short(100_000)) {
                seen += 1
                if seen == 5 { break }
            }
            chosen = chat.generatedTokens
        }
        // A stream that was left holds its session until the model has stopped.
        _ = try await chat.peekLogits("x")
        let after = chat.generatedTokens
        #expect(chosen >= 5 && after <= chosen + 1, "\(chosen) at the cancel, \(after) in all")
        let turns = try await engine.memory.turns(user: "ada", session: "trip", range: before..<before + 9)
        #expect(turns.map(\.role) == [.user, .assistant] && turns[1].numTokens == after)
    }
    #expect(try await engine.memory.doctor().problems.isEmpty)
    try await engine.close()
}

@Test func aSecondStreamIsRefusedWhileTheFirstIsOpen() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    let first = chat.send("one", options: short(1_000_000))
    #expect(await failure { try await chat.send("two").text() }?.kind == .locked)
    chat.close()
    #expect(await failure { try await chat.send("two").text() }?.kind == .invalidArgument)
    _ = try? await first.text()
    let again = try await engine.session(user: "ada", session: "trip")
    _ = try await again.send("three", options: short(2)).text()
    try await engine.close()
}

@Test func aStreamIsCancelledAndClosedByItself() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    let closed = chat.send("tell me", options: short(1_000_000))
    let reader = closed.makeAsyncIterator()
    let begins = try await reader.next() != nil
    try await closed.close()
    let ends = try await reader.next() == nil
    #expect(begins && ends)
    #expect(try chat.numTurns == 2)
    let cancelled = chat.send("and again", options: short(1_000_000))
    cancelled.cancel()
    #expect(await failure { try await cancelled.text() }?.kind == .cancelled)
    // An error of the work reaches who closes, once.
    let failing = chat.send("x", options: SendOptions(topP: 1.5))
    #expect(await failure { try await failing.close() }?.kind == .invalidArgument)
    try await failing.close()
    // So does that of a stream that never began, unless it was read.
    let gone = try await engine.session(user: "ada", session: "gone")
    gone.close()
    let unread = gone.send("x")
    #expect(await failure { try await unread.close() }?.kind == .invalidArgument)
    try await unread.close()
    let read = gone.send("x")
    #expect(await failure { try await read.text() }?.kind == .invalidArgument)
    try await read.close()
    let summary = try await chat.feed("The sheep went up the hill. ").finish()
    #expect(summary.bytes == 28)
    try await engine.close()
}

@Test func errorsHaveTheirKindAndNameWhatTheySaw() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    let bad = await failure { try await chat.send("x", options: SendOptions(topP: 1.5)).text() }
    #expect(bad?.kind == .invalidArgument && bad?.message.contains("top_p") == true)
    #expect(bad?.localizedDescription.contains("top_p") == true)
    #expect(await failure { try await engine.session(user: "ada", session: "trip") }?.kind == .locked)
    #expect(await failure { try await folder.engine() }?.kind == .locked)
    #expect(await failure { try await chat.regenerate().text() }?.kind == .notFound)
    #expect(await failure { try await engine.session(user: "", session: "x") }?.kind == .invalidArgument)
    do throws(MKAError) {
        _ = try await Engine.open(
            at: folder.url.appendingPathComponent("b"), model: .path(folder.url.appendingPathComponent("none.gguf")))
        Issue.record("a model that is missing was opened")
    } catch {
        #expect(error.kind == .notFound && error.message.contains("none.gguf"))
    }
    try await engine.close()
    #expect(await failure { try await engine.memory.recall("x", user: "ada") }?.message.contains("closed") == true)
    _ = try await folder.engine().close()
}

@Test func aDocumentIsFedWithProgress() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "book")
    let text = String(repeating: "The sheep and the goats went up the hill in the rain. ", count: 500)
    var last: UInt64 = 0
    var summary: FeedSummary?
    for try await event in chat.feed(text, options: FeedOptions(name: "hill.txt")) {
        switch event {
        case .progress(let fed, _, let total):
            #expect(fed >= last && total == UInt64(text.utf8.count))
            last = fed
        case .done(let done): summary = done
        }
    }
    #expect(summary?.bytes == UInt64(text.utf8.count))
    let hits = try await engine.memory.recall("sheep on the hill", user: "ada", session: "book", k: 2)
    #expect(hits.first?.source.name == "hill.txt" && hits.first?.trust == .document)
    try await engine.close()
}

@Test func whatWasSaidElsewhereIsTakenIn() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "moved")
    let turns = [
        NewTurn("Be brief.", role: .system), NewTurn("where is the key"),
        NewTurn("the key is under the stone", role: .assistant),
    ]
    let summary = try await chat.append(turns).finish()
    #expect(summary.modelTokens > 20 && summary.chunksAdded > 0)
    #expect(try chat.numTurns == 2)
    let hits = try await engine.memory.recall("the key", user: "ada", session: "moved", k: 2)
    #expect(hits.contains { $0.text.contains("under the stone") })
    _ = try await chat.append("which stone").finish()
    #expect(try chat.numTurns == 3)
    try await engine.close()
}

@Test func memoryRemembersRecallsForgetsAndVerifies() async throws {
    let folder = try Folder()
    let engine = try await folder.engine(model: nil)
    let memory = engine.memory
    try await memory.remember("The hotel is the Sakura Inn.", user: "ada", session: "trip")
    let old = NewTurn("The passport is X1234567.", time: Date(timeIntervalSince1970: 1000))
    let done = try await memory.remember([old], user: "ada", agent: "planner", session: "trip")
    #expect(done.turns == [0] && done.chunksAdded == 1)
    #expect(try await memory.recall("hotel", user: "ada", k: 1).first?.text == "The hotel is the Sakura Inn.")
    #expect(try await memory.recall("hotel", user: "bob").isEmpty)
    let recent = RecallOptions(sinceMs: 2_000_000)
    #expect(try await memory.recall("passport", user: "ada", options: recent).allSatisfy { $0.source.timeMs > 2_000_000 })
    let chat = try await engine.session(user: "ada", session: "trip")
    let context = try await chat.context("hotel", budgetTokens: 100)
    #expect(context.text.contains("Sakura") && context.tokens <= 100)
    let receipt = try await memory.forget(.matching("passport"), user: "ada")
    #expect(receipt.turns == 1)
    try await memory.verify(receipt)
    try await memory.verify(record: receipt.record)
    #expect(await failure { try await memory.verify(record: "none") }?.kind == .invalidArgument)
    #expect(try await !memory.chunks(user: "ada").contains { $0.text.contains("X1234567") })
    #expect(try await memory.sessions(user: "ada").count == 2)
    let rows = try await memory.embed(["a cat", "a dog"])
    #expect(rows.count == 2 && abs(rows[0].map { $0 * $0 }.reduce(0, +) - 1) < 1e-4)
    #expect(try memory.stats.sessions == 2)
    #expect(await failure { try await chat.send("hello").text() }?.message.contains("no model") == true)
    try await engine.close()
}

@Test func aStoreIsLookedAfter() async throws {
    let folder = try Folder()
    let options = EngineOptions(
        backend: .redb, encryptionKey: Data(0..<32),
        hygiene: Hygiene(secrets: .withhold))
    let engine = try await Engine.open(at: folder.store, options: options)
    let memory = engine.memory
    let monday = Date(timeIntervalSince1970: 1_772_409_600)
    let committed = try await memory.remember(
        [
            NewTurn("I live in Osaka.", time: monday, subject: "home"),
            NewTurn("I live in Kyoto.", time: monday + 86400, subject: "home"),
            NewTurn("The market is closed today.", time: monday, expires: monday + 86400),
            NewTurn("My password: hunter2hunter2", time: monday),
        ], user: "ada", session: "trip")
    #expect(committed.findings.map(\.kind) == [.password])
    let now = try await memory.recall("where do I live", user: "ada")
    #expect(!now.contains { $0.text == "I live in Osaka." })
    let then = RecallOptions(asOfMs: monday.milliseconds)
    let past = try await memory.recall("where do I live", user: "ada", options: then)
    #expect(past.contains { $0.text == "I live in Osaka." })
    #expect(try await memory.forget(.expired(monday + 2 * 86400), user: "ada").turns == 1)
    try await memory.compact()
    #expect(try await memory.doctor().problems.isEmpty)
    let usage = try await memory.diskUsage()
    // An encrypted store has neither graphs nor images on the disk.
    #expect(usage.liveBytes > 0 && usage.graphBytes == 0 && usage.imageBytes == 0)
    #expect(try await memory.sessions(user: "ada").first?.numPages == 0)
    let log = folder.url.appendingPathComponent("log.jsonl")
    #expect(try await memory.export(user: "ada", to: log).turns == 4)
    let copy = folder.url.appendingPathComponent("copy.mka")
    #expect(try await memory.backup(to: copy).records > 0)
    let stats = try memory.stats
    #expect(stats.encrypted && stats.vectorsUnread == 0 && stats.vectorsInGraphs == 0)
    try await engine.close()
    let again = try await Engine.open(at: copy, options: options)
    #expect(try await again.memory.importLog(from: log).skipped == 4)
    try await again.close()
    let short = EngineOptions(encryptionKey: Data([1, 2]))
    let wrong = folder.url.appendingPathComponent("wrong.mka")
    #expect(await failure { try await Engine.open(at: wrong, options: short) }?.kind == .invalidArgument)
}

@Test func cancellingTheTaskEndsLongWork() async throws {
    let folder = try Folder()
    let engine = try await Engine.open(at: folder.store)
    let memory = engine.memory
    try await memory.remember("The hotel is in Kyoto.", user: "ada", session: "trip")
    let log = folder.url.appendingPathComponent("log.jsonl")
    let copy = folder.url.appendingPathComponent("copy")
    #expect(try await memory.export(to: log).turns == 1)
    let works: [@Sendable () async throws -> Void] = [
        { _ = try await memory.export(to: copy) },
        { _ = try await memory.importLog(from: log) },
        { _ = try await memory.backup(to: copy) },
        { _ = try await memory.doctor() },
    ]
    for work in works {
        let task = Task {
            // Until it is cancelled: the work is short.
            try? await Task.sleep(for: .seconds(60))
            return await failure(work)
        }
        task.cancel()
        #expect(await task.value?.kind == .cancelled)
    }
    #expect(!FileManager.default.fileExists(atPath: copy.path))
    #expect(try await memory.doctor().problems.isEmpty)
    try await engine.close()
}

@Test func metadataIsKeptAndAskedFor() async throws {
    let folder = try Folder()
    let engine = try await Engine.open(at: folder.store)
    let memory = engine.memory
    try await memory.remember(
        [
            NewTurn("The hotel is the Sakura Inn.", metadata: ["kind": "place", "year": 2025, "final": true]),
            NewTurn("The hotel was the Ritz.", metadata: ["kind": "place", "year": 2019]),
            NewTurn("The hotel of nobody."),
        ], user: "ada", session: "trip")
    func found(_ filter: Filter) async throws -> [String] {
        let options = RecallOptions(filter: filter)
        return try await memory.recall("hotel", user: "ada", options: options).map(\.text).sorted()
    }
    #expect(try await found(.atLeast("year", 2020)) == ["The hotel is the Sakura Inn."])
    #expect(try await found(.all(.equals("kind", "place"), .no(.has(key: "final")))) == ["The hotel was the Ritz."])
    #expect(try await found(.any(.atMost("year", 2019), .equals("final", true))).count == 2)
    #expect(try await found(.no(.equals("kind", "place"))) == ["The hotel of nobody."])
    let turns = try await memory.turns(user: "ada", session: "trip")
    #expect(turns[1].metadata == ["kind": "place", "year": 2019])
    let forgotten = turns.filter { !$0.remember }
    #expect(forgotten.isEmpty)
    let others = RecallOptions(exceptTurns: [0, 2])
    let rest = try await memory.recall("hotel", user: "ada", session: "trip", options: others)
    #expect(rest.map(\.source.turn) == [1])
    let hits = try await memory.recall("hotel", user: "ada")
    #expect(hits.allSatisfy { 0...1 ~= $0.relevance && 0...1 ~= $0.why.coverage })
    let ritz = hits.first { $0.source.turn == 1 }
    #expect(ritz?.source.metadata == ["kind": "place", "year": 2019])
    #expect(await failure { try await memory.forget(.filter(.all()), user: "ada") }?.kind == .invalidArgument)
    let receipt = try await memory.forget(.filter(.equals("final", true)), user: "ada")
    #expect(receipt.turns == 1)
    try await engine.close()
}

@Test func timesAreDatesToo() async throws {
    let monday = Date(timeIntervalSince1970: 1_772_409_600.125)
    #expect(Date(milliseconds: monday.milliseconds) == monday)
    #expect(Date.distantPast.milliseconds < 0 && Date(milliseconds: .max).milliseconds > monday.milliseconds)
    #expect(Date(timeIntervalSince1970: .infinity).milliseconds == Int64.max)
    var options = RecallOptions()
    options.since = monday
    options.until = monday + 1
    options.asOf = monday + 2
    options.now = monday + 3
    let start = monday.milliseconds
    let expected = RecallOptions(sinceMs: start, untilMs: start + 1000, asOfMs: start + 2000, nowMs: start + 3000)
    #expect(options == expected)
    #expect(options.since == monday && options.until == monday + 1)
    #expect(options.asOf == monday + 2 && options.now == monday + 3)
    options.until = nil
    options.asOf = nil
    #expect(options.untilMs == nil && options.asOfMs == nil)
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    var said = short(2)
    said.time = monday
    _ = try await chat.send("hello there", options: said).text()
    var given = FeedOptions(mode: .text)
    given.time = monday + 60
    _ = try await chat.feed("The sheep and the goats went up the hill in the rain.", options: given).finish()
    let fact = NewTurn("The market is closed.", time: monday + 120, expires: monday + 180)
    try await engine.memory.remember([fact], user: "ada", session: "facts")
    let turns = try await engine.memory.turns(user: "ada", session: "trip")
    #expect(turns[0].time == monday && turns[0].expires == nil)
    let facts = try await engine.memory.turns(user: "ada", session: "facts")
    #expect(facts[0].time == monday + 120 && facts[0].expires == monday + 180)
    options.since = monday + 30
    options.now = monday + 150
    let hits = try await engine.memory.recall("the sheep, the hill", user: "ada", options: options)
    #expect(hits.first?.source.time == monday + 60)
    let market = try await engine.memory.recall("the market", user: "ada", session: "facts", options: options)
    #expect(market.first?.source.expires == monday + 180)
    #expect(try await engine.memory.sessions(user: "ada").first?.lastTime == monday + 120)
    try await engine.close()
}

@Test func recallInsideAttentionIsChosenAndReported() async throws {
    let folder = try Folder()
    let engine = try await Engine.open(
        at: folder.store, model: .path(tinyModel),
        options: EngineOptions(
            device: "cpu", windowTokens: 64, blockTokens: 64, recall: .pages,
            pages: PageConfig(tokens: 64, precision: .int8, scan: .twoLevel, firstLayer: 0)))
    #expect(try engine.kvBytesPerToken != nil)
    let chat = try await engine.session(user: "ada", session: "trip")
    let text = String(repeating: "The sheep went up the hill. ", count: 20)
    _ = try await chat.feed(text, options: FeedOptions(mode: .model)).finish()
    // Read with the window alone, recalled all the same.
    _ = try await chat.feed(text, options: FeedOptions(mode: .model, recall: .off)).finish()
    let usage = try await chat.send("and then?", options: short(4)).text().usage
    #expect(try #require(usage.pages).storedTokens > 128)
    try await engine.close()
}

@Test func eightTasksOnOneEngineLoseNoTurn() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    try await withThrowingTaskGroup(of: Void.self) { group in
        for number in 0..<8 {
            group.addTask {
                let chat = try await engine.session(user: "ada", session: "s\(number)")
                for turn in 0..<3 {
                    _ = try await chat.send("turn \(turn)", options: short(4)).text()
                    _ = try await engine.memory.recall("turn", user: "ada")
                }
            }
        }
        try await group.waitForAll()
    }
    let sessions = try await engine.memory.sessions(user: "ada")
    #expect(sessions.count == 8 && sessions.allSatisfy { $0.numTurns >= 6 })
    try await engine.close()
}

/// What a closure that other threads call has seen.
final class Seen: @unchecked Sendable {
    private let lock = NSLock()
    private var lines: [String] = []

    func add(_ line: String) { lock.withLock { lines.append(line) } }
    var all: [String] { lock.withLock { lines } }
}

@Test func messagesReachTheClosure() async throws {
    let seen = Seen()
    try forwardLogs(level: .info) { _, place, message in seen.add("\(place) \(message)") }
    let folder = try Folder()
    let engine = try await folder.engine()
    try forwardLogs(to: nil)
    #expect(seen.all.contains { $0.hasPrefix("mka::engine open model") })
    try await engine.close()
}
