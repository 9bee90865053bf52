// A chat that remembers: `Chat [STORE] [MODEL]` reads messages from standard input.
// Knows the public API only.

import Foundation
import MKA

let arguments = CommandLine.arguments
let store = URL(fileURLWithPath: arguments.count > 1 ? arguments[1] : "chat.mka")
let model: ModelSource =
    arguments.count > 2
    ? .path(URL(fileURLWithPath: arguments[2])) : .hub("HuggingFaceTB/SmolLM2-135M-Instruct")
var options = EngineOptions()
options.windowTokens = ProcessInfo.processInfo.environment["MKA_WINDOW"].flatMap(UInt64.init)
let engine = try await Engine.open(at: store, model: model, options: options)
let chat = try await engine.session(user: "me", session: "chat")
while let message = readLine() {
    do {
        for try await event in chat.send(message, options: SendOptions(maxNewTokens: 256)) {
            switch event {
            case .recalled(let hits): FileHandle.standardError.write(Data("(\(hits.count) memories)\n".utf8))
            case .token(let token): print(token.text, terminator: "")
            case .done: print()
            }
        }
    } catch {
        print("error: \(error)")
    }
}
try await engine.close()
