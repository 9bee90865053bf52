// Owns the engine: opening and closing a memory folder with its model.
// Knows no turn.

import Foundation
import MKABindings

/// Version of the library.
public let version: String = MKABindings.version()

/// Names of the devices that this build can use here, the fastest last.
public func availableDevices() -> [String] { MKABindings.availableDevices() }

/// The calls of tools in the text of an answer, in the order in which they stand there; what is no JSON of the form that models
/// write (Hermes and Qwen, Mistral, Llama 3) is none.
public func toolCalls(in answer: String) -> [ToolCall] { MKABindings.toolCalls(answer: answer) }

/// An open memory folder with its model, shared by its sessions.
public final class Engine: Sendable {
    private let native: NativeEngine
    /// The memory of every user: remember, recall, forget.
    public let memory: Memory

    private init(_ native: NativeEngine) {
        self.native = native
        self.memory = Memory(native.memory())
    }

    /// Opens the memory folder at `url`, created if missing; without a model, memory alone works.
    ///
    /// Throws `.locked` if it is open elsewhere, `.incompatible` if another embedder made it, `.notFound` naming every
    /// place where the model was looked for.
    public static func open(
        at url: URL, model: ModelSource? = nil, options: EngineOptions = EngineOptions()
    ) async throws(MKAError) -> Engine {
        var config = options
        if let model { config.model = model }
        let given = config
        return try await translated {
            Engine(try await NativeEngine.open(path: url.path, config: given))
        }
    }

    /// Opens a conversation, new or continued where it stopped; one handle of it at a time.
    public func session(
        user: String, agent: String? = nil, session: String
    ) async throws(MKAError) -> Session {
        let scope = Scope(user: user, agent: agent, session: session)
        return try await translated { [native] in Session(try await native.session(scope: scope)) }
    }

    /// Tokens of `text` as the model counts them; without a model one for every two bytes, as `context` counts.
    public func countTokens(_ text: String) throws(MKAError) -> UInt64 {
        try translated { try native.countTokens(text: text) }
    }

    /// Where the model runs.
    public var device: String {
        get throws(MKAError) { try translated { try native.device() } }
    }

    /// Name of the model's folder or file; nil without a model.
    public var modelName: String? {
        get throws(MKAError) { try translated { try native.modelName() } }
    }

    /// Tokens that the model was trained on at once; nil without a model.
    public var trainedTokens: UInt64? {
        get throws(MKAError) { try translated { try native.trainedTokens() } }
    }

    /// Bytes of keys and values that one token takes; nil without a model.
    public var kvBytesPerToken: UInt64? {
        get throws(MKAError) { try translated { try native.kvBytesPerToken() } }
    }

    /// Closes sessions and store, cancels what runs, and waits until the folder is free.
    ///
    /// An engine that is dropped closes too, without being waited for.
    public func close() async throws(MKAError) {
        try await translated { [native] in try await native.close() }
    }
}
