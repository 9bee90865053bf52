// Owns the plain values of the package; what needs no Swift form of its own is the generated record.
// Knows no call.

import Foundation
import MKABindings

/// A remembered piece of text that answers a query.
public typealias Hit = MKABindings.Hit
/// What a score is made of.
public typealias Why = MKABindings.Why
/// Where a text was said.
public typealias Source = MKABindings.Source
/// How far a recalled text may be believed.
public typealias Trust = MKABindings.Trust
/// Who produced a turn.
public typealias Role = MKABindings.Role
/// Text assembled for a model that lives elsewhere.
public typealias Context = MKABindings.Context
/// What one turn cost, in tokens.
public typealias Usage = MKABindings.Usage
/// Why an answer ended.
public typealias StopReason = MKABindings.StopReason
/// What feeding a document did.
public typealias FeedSummary = MKABindings.FeedSummary
/// What remembering did.
public typealias Committed = MKABindings.Committed
/// What was erased, without the erased text.
public typealias Receipt = MKABindings.Receipt
/// A remembered piece of text, for a list of what memory holds.
public typealias ChunkInfo = MKABindings.ChunkInfo
/// A turn as it stands in the log.
public typealias Turn = MKABindings.Turn
/// A session, for a list of sessions.
public typealias SessionInfo = MKABindings.SessionInfo
/// What a store holds.
public typealias Stats = MKABindings.Stats
/// What recall inside attention did for a turn.
public typealias PageUsage = MKABindings.PageUsage
/// Something in a turn that looks sensitive.
public typealias Finding = MKABindings.Finding
/// A kind of sensitive text, by its form.
public typealias Sensitive = MKABindings.Sensitive
/// What a store takes on the disk.
public typealias DiskUsage = MKABindings.DiskUsage
/// What an export wrote.
public typealias Exported = MKABindings.Exported
/// What an import took in.
public typealias Imported = MKABindings.Imported
/// What a backup copied.
public typealias Backup = MKABindings.Backup
/// What a check found.
public typealias Checkup = MKABindings.Checkup
/// Something that is not as it should be.
public typealias Problem = MKABindings.Problem
/// What became, or can become, of something damaged.
public typealias Repair = MKABindings.Repair
/// User, agent and session.
public typealias Scope = MKABindings.Scope
/// Which model to load.
public typealias ModelSource = MKABindings.ModelSource
/// How an engine is opened; what is left out is the engine's default.
public typealias EngineOptions = MKABindings.EngineConfig
/// What turns sentences into vectors.
public typealias EmbedderSource = MKABindings.EmbedderSource
/// How a sentence encoder multiplies by its weights.
public typealias EmbedderPrecision = MKABindings.EmbedderPrecision
/// How much of a recalled passage is quoted.
public typealias Quote = MKABindings.Quote
/// How older tokens come back into a turn.
public typealias RecallPolicy = MKABindings.RecallPolicy
/// Recall inside attention; what is left out is the engine's default.
public typealias PageConfig = MKABindings.PageConfig
/// How stored keys and values are held.
public typealias PagePrecision = MKABindings.PagePrecision
/// How tokens are chosen for recall inside attention.
public typealias PageRule = MKABindings.PageRule
/// What is scored on the processor for a choice before keys are.
public typealias LandmarkScan = MKABindings.LandmarkScan
/// What a block of a prompt attends to.
public typealias Prefill = MKABindings.Prefill
/// Which database keeps the small records of a new store.
public typealias Backend = MKABindings.Backend
/// What memory does not store twice, and what not at all; what is left out is the engine's default.
public typealias Hygiene = MKABindings.Hygiene
/// What to do with a turn that holds something sensitive.
public typealias Policy = MKABindings.Policy
/// How one message is answered; what is left out is the engine's default. `seed` is 0 if left out: two runs draw the same.
public typealias SendOptions = MKABindings.SendOptions
/// A call of a tool, as a model wrote it: `arguments` is a JSON object.
public typealias ToolCall = MKABindings.ToolCall
/// What a tool gave back.
public typealias ToolResult = MKABindings.ToolResult
/// What an answer is held to, from its first token to its last.
public typealias Grammar = MKABindings.Grammar
/// How a document is taken in; what is left out is the engine's default.
public typealias FeedOptions = MKABindings.FeedOptions
/// What of a document the model reads.
public typealias FeedMode = MKABindings.FeedMode
/// How to recall; what is left out is the engine's default.
public typealias RecallOptions = MKABindings.RecallOptions
/// What a key of a turn's metadata is set to: a literal of a flag, a number or a text.
public typealias MetadataValue = MKABindings.MetadataValue
/// Which turns a recall may see, by their metadata; a turn without a key is seen by no comparison of it.
public typealias Filter = MKABindings.Filter

/// A piece of an answer: whole UTF-8.
public struct Token: Sendable, Hashable {
    /// What it adds to the answer.
    public let text: String
}

/// What happens while a turn is answered.
public enum Event: Sendable {
    /// Memories that were put before the message, best first.
    case recalled([Hit])
    /// A piece of the answer.
    case token(Token)
    /// The turn is on disk; nothing follows.
    case done(Usage)
}

/// What happens while a document is fed.
public enum FeedEvent: Sendable {
    /// Bytes taken in so far, and how many of them are on disk.
    case progress(fedBytes: UInt64, committedBytes: UInt64, totalBytes: UInt64)
    /// The whole document is on disk; nothing follows.
    case done(FeedSummary)
}

/// A turn to be remembered.
public struct NewTurn: Sendable {
    /// Its text.
    public var text: String
    /// Who produced it.
    public var role: Role
    /// When it was said; the first moment of 1970, the library's 0, means now.
    public var time: Date
    /// Where the text comes from: a file name, a URL.
    public var source: String?
    /// Whether it can be recalled later; nil decides by role.
    public var remember: Bool?
    /// What it is a fact about: the newest turn of a subject wins.
    public var subject: String?
    /// When it stops being recalled.
    public var expires: Date?
    /// What the filter of a recall asks for.
    public var metadata: [String: MetadataValue]

    /// A turn said now, unless told otherwise.
    public init(
        _ text: String, role: Role = .user, time: Date = Date(), source: String? = nil,
        remember: Bool? = nil, subject: String? = nil, expires: Date? = nil,
        metadata: [String: MetadataValue] = [:]
    ) {
        self.text = text
        self.role = role
        self.time = time
        self.source = source
        self.remember = remember
        self.subject = subject
        self.expires = expires
        self.metadata = metadata
    }

    var native: MKABindings.NewTurn {
        MKABindings.NewTurn(
            role: role, text: text, timeMs: time.milliseconds, source: source, remember: remember,
            subject: subject, expiresMs: expires?.milliseconds, metadata: metadata)
    }
}

/// What to erase.
public enum Forget: Sendable {
    /// Every turn whose text, source name, subject or metadata contains this text, letter case aside.
    case matching(String)
    /// Every turn whose metadata this accepts; a filter that accepts every turn, or none, whatever their metadata, is refused.
    case filter(Filter)
    /// One turn of the session that the call names; `.invalidArgument` without one.
    case turn(UInt64)
    /// These turns of the session, one at least.
    case turns([UInt64])
    /// Every turn before a time.
    case before(Date)
    /// Every turn whose time to be recalled was over at a time.
    case expired(Date)
    /// The whole session that the call names; `.invalidArgument` without one.
    case session
    /// Every session.
    case everything

    var native: MKABindings.Forget {
        switch self {
        case .matching(let text): .matching(text: text)
        case .filter(let filter): .filter(filter: filter)
        case .turn(let turn): .turn(turn: turn)
        case .turns(let turns): .turns(turns: turns)
        case .before(let time): .before(timeMs: time.milliseconds)
        case .expired(let time): .expired(timeMs: time.milliseconds)
        case .session: .session
        case .everything: .everything
        }
    }
}

extension MetadataValue: ExpressibleByBooleanLiteral, ExpressibleByIntegerLiteral,
    ExpressibleByFloatLiteral, ExpressibleByStringLiteral
{
    public init(booleanLiteral flag: Bool) { self = .flag(flag: flag) }
    public init(integerLiteral number: Int) { self = .number(number: Double(number)) }
    public init(floatLiteral number: Double) { self = .number(number: number) }
    public init(stringLiteral text: String) { self = .text(text: text) }
}

extension ModelSource {
    /// A repository of the HuggingFace hub, `owner/name`.
    public static func hub(_ id: String) -> ModelSource { .hub(id: id) }

    /// A HuggingFace folder or a GGUF file.
    public static func path(_ url: URL) -> ModelSource { .path(path: url.path) }

    /// A path if it exists, or else the id of a repository.
    public static func named(_ name: String) -> ModelSource { .named(name: name) }
}

extension Grammar {
    /// JSON that fits `schema`, itself JSON, its properties in the schema's order.
    public static func jsonSchema(_ schema: String) -> Grammar { .jsonSchema(schema: schema) }

    /// Text that `pattern` matches as a whole, in the syntax of Rust's crate `regex`.
    public static func regex(_ pattern: String) -> Grammar { .regex(pattern: pattern) }

    /// Text of a context-free grammar in Lark's notation, as llguidance reads it.
    public static func lark(_ text: String) -> Grammar { .lark(text: text) }
}

extension Filter {
    /// The key is set to this value.
    public static func equals(_ key: String, _ value: MetadataValue) -> Filter {
        .oneOf(key: key, values: [value])
    }

    /// The key is set to `value` or more.
    public static func atLeast(_ key: String, _ value: MetadataValue) -> Filter {
        .range(key: key, from: value, to: nil)
    }

    /// The key is set to `value` or less.
    public static func atMost(_ key: String, _ value: MetadataValue) -> Filter {
        .range(key: key, from: nil, to: value)
    }

    /// All of them hold.
    public static func all(_ filters: Filter...) -> Filter { .and(filters: filters) }

    /// One of them holds.
    public static func any(_ filters: Filter...) -> Filter { .or(filters: filters) }

    /// None of them holds.
    public static func no(_ filters: Filter...) -> Filter { .not(filters: filters) }
}

extension MKABindings.Vectors {
    /// One array a row.
    var rows: [[Float]] {
        let values = data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        let dim = max(Int(self.dim), 1)
        return stride(from: 0, to: values.count, by: dim).map { Array(values[$0..<($0 + dim)]) }
    }
}
