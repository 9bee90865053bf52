// Memory beside the basics of MKATests: what is erased, replaced, listed and marked.
// Knows no folder and no model of its own: those are in MKATests.

import MKA
import Testing

@Test func severalTurnsAreErasedAtOnce() async throws {
    let folder = try Folder()
    let engine = try await folder.engine(model: nil)
    let memory = engine.memory
    let texts = ["The otter is 1.", "The heron is 2.", "The badger is 3."]
    try await memory.remember(texts.map { NewTurn($0) }, user: "ada", session: "trip")
    #expect(
        await failure { try await memory.forget(.turns([0, 3]), user: "ada", session: "trip") }?.kind == .notFound)
    #expect(
        await failure { try await memory.forget(.turns([]), user: "ada", session: "trip") }?.kind == .invalidArgument)
    let receipt = try await memory.forget(.turns([2, 0]), user: "ada", session: "trip")
    #expect(receipt.turns == 2)
    try await memory.verify(receipt)
    let turns = try await memory.turns(user: "ada", session: "trip")
    #expect(turns.map(\.forgotten) == [true, false, true])
    try await engine.close()
}

@Test func aTurnIsReplacedByOneThatIsRememberedFirst() async throws {
    let folder = try Folder()
    let engine = try await folder.engine(model: nil)
    let memory = engine.memory
    try await memory.remember("The hotel is in Kyoto.", user: "ada", session: "trip")
    let done = try await memory.replace(0, with: NewTurn("The hotel is in Nara."), user: "ada", session: "trip")
    #expect(done.turns == [1])
    #expect(try await memory.recall("hotel", user: "ada").map(\.text) == ["The hotel is in Nara."])
    let missing = await failure { try await memory.replace(2, with: NewTurn("No."), user: "ada", session: "trip") }
    #expect(missing?.kind == .notFound)
    let again = try await memory.replace(1, with: "The hotel is in Uji.", user: "ada", session: "trip")
    #expect(again.turns == [2])
    let turns = try await memory.turns(user: "ada", session: "trip")
    #expect(turns.map(\.forgotten) == [true, true, false])
    #expect(turns[2].text == "The hotel is in Uji." && turns[2].role == .user)
    try await engine.close()
}

@Test func whatIsSentAndFedIsMarked() async throws {
    let folder = try Folder()
    let engine = try await folder.engine()
    let chat = try await engine.session(user: "ada", session: "trip")
    let sending = SendOptions(maxNewTokens: 2, metadata: ["kind": "chat", "year": 2025])
    _ = try await chat.send("hello there", options: sending).text()
    let feeding = FeedOptions(mode: .model, metadata: ["kind": "page"])
    _ = try await chat.feed("The otter is 1.", options: feeding).finish()
    let turns = try await engine.memory.turns(user: "ada", session: "trip")
    let kinds: [MetadataValue?] = ["chat", "chat", "page"]
    #expect(turns.map { $0.metadata["kind"] } == kinds)
    let told = try await engine.session(user: "ada", session: "told")
    let instructed = FeedOptions(mode: .model, system: "Say red.")
    let fed = try await told.feed("The otter is 1.", options: instructed).finish()
    let bare = try await engine.session(user: "ada", session: "bare")
    let plain = try await bare.feed("The otter is 1.", options: FeedOptions(mode: .model)).finish()
    #expect(fed.modelTokens > plain.modelTokens)
    let refused = SendOptions(metadata: ["mka.kind": true])
    #expect(await failure { try await chat.send("hello", options: refused).text() }?.kind == .invalidArgument)
    let receipt = try await engine.memory.forget(.filter(.equals("kind", "chat")), user: "ada")
    #expect(receipt.turns == 2)
    try await engine.close()
}

@Test func chunksAreListedByTheirMarksAndUsersByName() async throws {
    let folder = try Folder()
    let engine = try await folder.engine(model: nil)
    let memory = engine.memory
    let turns = [NewTurn("The otter is 1.", metadata: ["kind": "note"]), NewTurn("The heron is 2.")]
    try await memory.remember(turns, user: "bob", session: "trip")
    try await memory.remember("The lynx is 5.", user: "ada", session: "trip")
    let notes = try await memory.chunks(user: "bob", filter: .equals("kind", "note"))
    #expect(notes.map(\.text) == ["The otter is 1."])
    #expect(try await memory.chunks(user: "bob").count == 2)
    #expect(try memory.users == ["ada", "bob"])
    try await engine.close()
}

@Test func aMessageAndAContextLookUpWhatAFilterAccepts() async throws {
    let folder = try Folder()
    // Half the window may be quoted: in less there is no room for a memory and its header.
    let engine = try await Engine.open(
        at: folder.store, model: .path(tinyModel), options: EngineOptions(device: "cpu", windowTokens: 256))
    let memory = engine.memory
    let turns = [
        NewTurn("heron: 7654321", metadata: ["kind": "note"]), NewTurn("heron: 1234567", metadata: ["kind": "draft"]),
    ]
    try await memory.remember(turns, user: "ada", session: "other")
    let chat = try await engine.session(user: "ada", session: "trip")
    let sending = SendOptions(maxNewTokens: 2, acrossSessions: true, recallFilter: .equals("kind", "note"))
    var found: [String] = []
    for try await event in chat.send("heron?", options: sending) {
        if case .recalled(let hits) = event { found += hits.map(\.text) }
    }
    #expect(found == ["heron: 7654321"])
    let drafts = RecallOptions(filter: .equals("kind", "draft"))
    let context = try await memory.context("heron", budgetTokens: 400, user: "ada", options: drafts)
    #expect(context.hits.map(\.text) == ["heron: 1234567"])
    #expect(try await memory.context("heron", budgetTokens: 400, user: "ada", session: "other").hits.count == 2)
    try await engine.close()
}
