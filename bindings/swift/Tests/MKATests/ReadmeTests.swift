// The README's example: compiled always, run where the default model is in the cache.
// The README holds the lines between the marks; a Python test compares them.

import Foundation
import MKA
import Testing

func readme(at url: URL) async throws {
    // README
    let engine = try await Engine.open(at: url, model: .hub("HuggingFaceTB/SmolLM2-135M-Instruct"))
    let chat = try await engine.session(user: "ada", session: "trip")  // continues where it stopped
    for try await event in chat.send("What did we decide about Kyoto?") {
        switch event {
        case .recalled(let hits): print("\(hits.count) memories")
        case .token(let token): print(token.text, terminator: "")
        case .done(let usage): print("reused \(usage.reusedTokens) of \(usage.promptTokens) tokens")
        }
    }  // leaving the loop, or cancelling its task, cancels
    let hits = try await engine.memory.recall("hotel in Kyoto", user: "ada", k: 8)
    let receipt = try await engine.memory.forget(.matching("passport"), user: "ada")
    // README
    print(hits.count, receipt.turns)
    try await engine.close()
}

@Test func theReadmesExampleRunsOverTheDefaultModel() async throws {
    let cache = ProcessInfo.processInfo.environment["MKA_CACHE"] ?? "/root/.cache/mka"
    guard FileManager.default.fileExists(atPath: cache + "/models/SmolLM2-135M-Instruct-Q4_1.gguf") else {
        print("skipped: the default model is not in \(cache) (fetch it first)")
        return
    }
    let folder = try Folder()
    try await readme(at: folder.store)
}
