// Reads events out of one piece of bytes: bindings/src/packed.rs writes them, and the two are changed together.
// Knows no call.

import Foundation
import MKABindings

/// Bytes of the library that are read from the front; numbers are little-endian without padding.
struct Packed {
    private let bytes: UnsafeRawBufferPointer
    private var at = 0

    init(_ bytes: UnsafeRawBufferPointer) {
        self.bytes = bytes
    }

    var isEmpty: Bool { at == bytes.count }

    private mutating func take(_ count: Int) throws(MKAError) -> UnsafeRawBufferPointer {
        guard count <= bytes.count - at else {
            throw MKAError(.internal, "events: \(bytes.count - at) bytes left at byte \(at), expected \(count)")
        }
        defer { at += count }
        return UnsafeRawBufferPointer(rebasing: bytes[at..<(at + count)])
    }

    fileprivate mutating func integer<T: FixedWidthInteger>(_: T.Type = T.self) throws(MKAError) -> T {
        T(littleEndian: try take(MemoryLayout<T>.size).loadUnaligned(as: T.self))
    }

    fileprivate mutating func float() throws(MKAError) -> Float { Float(bitPattern: try integer()) }

    fileprivate mutating func flag() throws(MKAError) -> Bool { try integer(UInt8.self) != 0 }

    fileprivate mutating func floats() throws(MKAError) -> [Float] {
        var values: [Float] = []
        for _ in 0..<(try integer(UInt32.self)) { values.append(try float()) }
        return values
    }

    fileprivate mutating func one<T>(of values: [T]) throws(MKAError) -> T {
        let index = Int(try integer(UInt8.self))
        guard index < values.count else {
            throw MKAError(.internal, "events: \(T.self) \(index) before byte \(at), expected less than \(values.count)")
        }
        return values[index]
    }

    /// A block with its length before it.
    fileprivate mutating func block() throws(MKAError) -> UnsafeRawBufferPointer {
        try take(Int(try integer(UInt32.self)))
    }

    fileprivate func unknown(_ kind: UInt8) -> MKAError {
        MKAError(.internal, "events: kind \(kind) at byte \(at - 1), expected one of the stream")
    }
}

/// An event that the library packs.
protocol Unpacked: Sendable {
    static func next(from bytes: inout Packed) throws(MKAError) -> Self
}

extension Event: Unpacked {
    static func next(from bytes: inout Packed) throws(MKAError) -> Event {
        switch try bytes.integer(UInt8.self) {
        case 1: .token(Token(text: String(decoding: try bytes.block(), as: UTF8.self)))
        case 2: .recalled(try bytes.hits())
        case 3: .done(try bytes.usage())
        case let kind: throw bytes.unknown(kind)
        }
    }
}

extension FeedEvent: Unpacked {
    static func next(from bytes: inout Packed) throws(MKAError) -> FeedEvent {
        switch try bytes.integer(UInt8.self) {
        case 4:
            .progress(
                fedBytes: try bytes.integer(), committedBytes: try bytes.integer(), totalBytes: try bytes.integer())
        case 5:
            .done(
                FeedSummary(
                    bytes: try bytes.integer(), modelTokens: try bytes.integer(), chunksAdded: try bytes.integer(),
                    chunksDeduplicated: try bytes.integer()))
        case let kind: throw bytes.unknown(kind)
        }
    }
}

extension Packed {
    fileprivate mutating func usage() throws(MKAError) -> Usage {
        let stop = try one(of: [StopReason.endOfTurn, .maxTokens, .stopString])
        var usage = Usage(
            promptTokens: try integer(), reusedTokens: try integer(), recalledTokens: try integer(),
            generatedTokens: try integer(), streamTokens: try integer(), stop: stop, pages: nil,
            answerTurn: try turn())
        if try flag() {
            usage.pages = PageUsage(
                storedTokens: try integer(), recalledTokens: try integer(), share: try floats(), recovered: try floats())
        }
        return usage
    }

    /// A turn, if there is one.
    private mutating func turn() throws(MKAError) -> UInt64? {
        let (isThere, number): (Bool, UInt64) = (try flag(), try integer())
        return isThere ? number : nil
    }

    /// The fixed parts of all hits stand before the texts of all, whose lengths are counted in Unicode scalars.
    fileprivate mutating func hits() throws(MKAError) -> [Hit] {
        var fixed = Packed(try block())
        let count = Int(try fixed.integer(UInt32.self))
        var texts = Texts(try fixed.behind(count: count))
        var hits: [Hit] = []
        for _ in 0..<count { hits.append(try fixed.hit(&texts)) }
        return hits
    }

    /// A time, if there is one.
    private mutating func time() throws(MKAError) -> Int64? {
        let (isThere, milliseconds): (Bool, Int64) = (try flag(), try integer())
        return isThere ? milliseconds : nil
    }

    /// Bytes of the fixed part of a hit.
    private static let fixedHit = 113

    /// What stands behind the fixed parts of `count` hits.
    private func behind(count: Int) throws(MKAError) -> UnsafeRawBufferPointer {
        var rest = self
        _ = try rest.take(count * Self.fixedHit)
        return try rest.take(rest.bytes.count - rest.at)
    }

    private mutating func hit(_ texts: inout Texts) throws(MKAError) -> Hit {
        let chunk = texts.take(32)
        let text = texts.take(try integer())
        // How long the texts of its source are together.
        _ = try integer(UInt32.self)
        let (score, relevance) = (try float(), try float())
        let trust = try one(of: [Trust.host, .user, .model, .document])
        let (count, stale): (UInt32, Bool) = (try integer(), try flag())
        let (user, agent) = (texts.take(try integer()), texts.takeIfThere(try integer()))
        let (session, name) = (texts.take(try integer()), texts.takeIfThere(try integer()))
        let (subject, marks) = (texts.takeIfThere(try integer()), texts.take(try integer()))
        let (bm25, coverage) = (try float(), try float())
        let bm25Rank: UInt32 = try integer()
        let why = Why(
            bm25: bm25, coverage: coverage, bm25Rank: bm25Rank == 0 ? nil : bm25Rank, cosine: try float(),
            cosineRank: try integer(), recency: try float(), followUp: try flag())
        let source = Source(
            user: user, agent: agent, session: session, turn: try integer(),
            role: try one(of: [.system, .user, .assistant, .document, .recalled, .tool]), start: try integer(),
            end: try integer(), timeMs: try integer(), name: name, subject: subject, expiresMs: try time(),
            metadata: metadata(marks))
        return Hit(
            chunk: chunk, text: text, score: score, relevance: relevance, why: why, source: source,
            trust: trust, count: count, stale: stale)
    }
}

/// The metadata that `marks` holds: each key, a letter for its value's kind, and the value, each with its length and a colon
/// before it.
private func metadata(_ marks: String) -> [String: MetadataValue] {
    var rest = marks.unicodeScalars[...]
    func part() -> String {
        let length = rest.prefix { $0 != ":" }
        rest = rest.dropFirst(length.count + 1)
        let count = max(Int(String(Substring(length))) ?? 0, 0)
        defer { rest = rest.dropFirst(count) }
        return String(Substring(rest.prefix(count)))
    }
    var values: [String: MetadataValue] = [:]
    while !rest.isEmpty {
        let (key, kind, value) = (part(), part(), part())
        switch kind {
        case "f": values[key] = .flag(flag: value == "1")
        case "n": values[key] = Double(value).map { .number(number: $0) }
        default: values[key] = .text(text: value)
        }
    }
    return values
}

/// One UTF-8 text that is cut from the front.
private struct Texts {
    private var rest: UnsafeRawBufferPointer.SubSequence

    init(_ bytes: UnsafeRawBufferPointer) {
        rest = bytes[...]
    }

    /// The next `scalars` Unicode scalars, fewer at the end.
    mutating func take(_ scalars: UInt32) -> String {
        var (end, left) = (rest.startIndex, scalars)
        while end < rest.endIndex {
            // Every byte but those that continue a scalar begins one.
            if rest[end] & 0xC0 != 0x80 {
                if left == 0 { break }
                left -= 1
            }
            end += 1
        }
        defer { rest = rest[end...] }
        return String(decoding: rest[..<end], as: UTF8.self)
    }

    mutating func takeIfThere(_ scalars: UInt32) -> String? {
        scalars == UInt32.max ? nil : take(scalars)
    }
}
