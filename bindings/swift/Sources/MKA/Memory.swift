// Owns memory over every session: remember, recall, forget, lists.
// Knows no model.

import Foundation
import MKABindings

/// Remember, recall and forget, over every session of the engine.
public final class Memory: Sendable {
    private let native: NativeMemory

    init(_ native: NativeMemory) {
        self.native = native
    }

    /// Appends turns to a session as text memory, on disk when it returns; no model reads them.
    @discardableResult
    public func remember(
        _ turns: [NewTurn], user: String, agent: String? = nil, session: String
    ) async throws(MKAError) -> Committed {
        let scope = Scope(user: user, agent: agent, session: session)
        return try await translated { [native] in
            try await native.remember(scope: scope, turns: turns.map(\.native))
        }
    }

    /// Appends something that the user said now.
    @discardableResult
    public func remember(
        _ text: String, user: String, agent: String? = nil, session: String
    ) async throws(MKAError) -> Committed {
        try await remember([NewTurn(text)], user: user, agent: agent, session: session)
    }

    /// Puts a fact right: remembers `new` in a session, then erases `turn` of it, as `forget` does.
    ///
    /// `new` has a number of its own, and is on disk before anything is erased: if that fails, both are there. Of what `turn`
    /// said nothing is left.
    @discardableResult
    public func replace(
        _ turn: UInt64, with new: NewTurn, user: String, agent: String? = nil, session: String
    ) async throws(MKAError) -> Committed {
        let scope = Scope(user: user, agent: agent, session: session)
        return try await translated { [native] in
            try await native.replace(scope: scope, turn: turn, newTurn: new.native)
        }
    }

    /// The same by something that the user said now.
    @discardableResult
    public func replace(
        _ turn: UInt64, with text: String, user: String, agent: String? = nil, session: String
    ) async throws(MKAError) -> Committed {
        try await replace(turn, with: NewTurn(text), user: user, agent: agent, session: session)
    }

    /// The memories that answer `query` best, best first; `k` stands before `options.k`.
    public func recall(
        _ query: String, user: String, agent: String? = nil, session: String? = nil,
        k: UInt64? = nil, options: RecallOptions = RecallOptions()
    ) async throws(MKAError) -> [Hit] {
        let scope = Scope(user: user, agent: agent, session: session)
        var asked = options
        if let k { asked.k = k }
        let given = asked
        return try await translated { [native] in
            try await native.recall(scope: scope, query: query, options: given)
        }
    }

    /// What a recall finds on `query`, laid out for another model, never above the budget; 32 memories if `options.k` is nil.
    ///
    /// With `session` that session alone is looked into, without it every session of the user.
    public func context(
        _ query: String, budgetTokens: UInt64, user: String, agent: String? = nil,
        session: String? = nil, options: RecallOptions = RecallOptions()
    ) async throws(MKAError) -> Context {
        let scope = Scope(user: user, agent: agent, session: session)
        return try await translated { [native] in
            try await native.context(
                scope: scope, query: query, budgetTokens: budgetTokens, options: options)
        }
    }

    /// Erases what `selector` names from log, chunks, vectors, words, pages and summaries. If anything is erased, a stream of
    /// this user that is under way ends with `.cancelled`.
    ///
    /// Of a filter, turns without the key, those of a chat too, are what `.no` accepts. One that accepts every turn, or none,
    /// whatever their metadata, is refused.
    public func forget(
        _ selector: Forget, user: String, agent: String? = nil, session: String? = nil
    ) async throws(MKAError) -> Receipt {
        let scope = Scope(user: user, agent: agent, session: session)
        return try await translated { [native] in
            try await native.forget(scope: scope, selector: selector.native)
        }
    }

    /// Checks that what was erased is in no file; throws `.corrupted` if it is.
    public func verify(_ receipt: Receipt) async throws(MKAError) {
        try await verify(record: receipt.record)
    }

    /// The same by a receipt's `record`, which is all that needs to be kept of it; throws `.invalidArgument` if it is none.
    public func verify(record: String) async throws(MKAError) {
        try await translated { [native] in try await native.verify(record: record) }
    }

    /// What memory holds, in the order in which it was first said; with `filter`, of turns whose metadata it accepts.
    public func chunks(
        user: String, agent: String? = nil, session: String? = nil,
        range: Range<UInt64> = 0..<UInt64.max, filter: Filter? = nil
    ) async throws(MKAError) -> [ChunkInfo] {
        let scope = Scope(user: user, agent: agent, session: session)
        return try await translated { [native] in
            try await native.chunks(
                scope: scope, start: range.lowerBound, end: range.upperBound, filter: filter)
        }
    }

    /// The log of a session.
    public func turns(
        user: String, agent: String? = nil, session: String,
        range: Range<UInt64> = 0..<UInt64.max
    ) async throws(MKAError) -> [Turn] {
        let scope = Scope(user: user, agent: agent, session: session)
        return try await translated { [native] in
            try await native.turns(scope: scope, start: range.lowerBound, end: range.upperBound)
        }
    }

    /// The users of whom there is a session, in the order of their names.
    public var users: [String] {
        get throws(MKAError) { try translated { try native.users() } }
    }

    /// The sessions of a user, by name.
    public func sessions(user: String, agent: String? = nil) async throws(MKAError) -> [SessionInfo] {
        let scope = Scope(user: user, agent: agent)
        return try await translated { [native] in try await native.sessions(scope: scope) }
    }

    /// One unit vector a text, by the store's embedder.
    public func embed(_ texts: [String]) async throws(MKAError) -> [[Float]] {
        try await translated { [native] in try await native.embed(texts: texts).rows }
    }

    /// Writes the log of every user into a file as lines of JSON. Throws `.cancelled` when its task is cancelled.
    public func export(to file: URL) async throws(MKAError) -> Exported {
        try await export(nil, to: file)
    }

    /// Writes the log of a scope into a file as lines of JSON. Throws `.cancelled` when its task is cancelled.
    public func export(
        user: String, agent: String? = nil, session: String? = nil, to file: URL
    ) async throws(MKAError) -> Exported {
        try await export(Scope(user: user, agent: agent, session: session), to: file)
    }

    private func export(_ scope: Scope?, to file: URL) async throws(MKAError) -> Exported {
        try await cancellable { native in
            try await native.export(scope: scope, path: file.path)
        }
    }

    /// Appends the turns of an exported file to the sessions that they come from; those that are held are skipped.
    ///
    /// Throws `.cancelled` when its task is cancelled: what was imported stays, and another import goes on from there.
    @discardableResult
    public func importLog(from file: URL) async throws(MKAError) -> Imported {
        try await cancellable { native in try await native.importLog(path: file.path) }
    }

    /// Copies the store as it is at one moment to a folder that does not exist yet; sessions go on meanwhile.
    /// Throws `.cancelled` when its task is cancelled.
    @discardableResult
    public func backup(to folder: URL) async throws(MKAError) -> Backup {
        try await cancellable { native in try await native.backup(path: folder.path) }
    }

    /// Compares every checksum, and the indexes with the log; with `repair`, makes anew what can be derived.
    /// Throws `.cancelled` when its task is cancelled.
    public func doctor(repair: Bool = false) async throws(MKAError) -> Checkup {
        try await cancellable { native in try await native.doctor(repair: repair) }
    }

    /// Awaits work that ends when the task is cancelled; the generated code tells the library nothing of that.
    private func cancellable<T: Sendable>(
        _ work: @Sendable (NativeMemory) async throws -> T
    ) async throws(MKAError) -> T {
        let twin = native.twin()
        return try await translated {
            try await withTaskCancellationHandler {
                try await work(twin)
            } onCancel: {
                twin.cancel()
            }
        }
    }

    /// Gives all space on the disk back that nothing uses.
    public func compact() async throws(MKAError) {
        try await translated { [native] in try await native.compact() }
    }

    /// What the store takes on the disk, and how much of it is in use.
    public func diskUsage() async throws(MKAError) -> DiskUsage {
        try await translated { [native] in try await native.diskUsage() }
    }

    /// Counts and bytes of the store.
    public var stats: Stats {
        get throws(MKAError) { try translated { try native.stats() } }
    }
}
