// Feeds a text of any length and asks about it: `LongDocument STORE MODEL TEXT QUESTION...`.
// Knows the public API only.

import Foundation
import MKA

let arguments = CommandLine.arguments
guard arguments.count >= 5 else {
    print("expected STORE MODEL TEXT QUESTION...")
    exit(2)
}
let text = try String(contentsOf: URL(fileURLWithPath: arguments[3]), encoding: .utf8)
var options = EngineOptions()
options.windowTokens = ProcessInfo.processInfo.environment["MKA_WINDOW"].flatMap(UInt64.init)
let engine = try await Engine.open(
    at: URL(fileURLWithPath: arguments[1]), model: .path(URL(fileURLWithPath: arguments[2])),
    options: options)
let chat = try await engine.session(user: "reader", session: "document")
let name = URL(fileURLWithPath: arguments[3]).lastPathComponent
for try await event in chat.feed(text, options: FeedOptions(name: name)) {
    switch event {
    case .progress(let fed, _, let total): print("\(100 * fed / max(total, 1)) %")
    case .done(let fed): print("fed \(fed.bytes) bytes: \(fed.chunksAdded) chunks remembered")
    }
}
for question in arguments[4...] {
    print("?", question)
    print(try await chat.send(question, options: SendOptions(maxNewTokens: 128)).text().text)
}
try await engine.close()
