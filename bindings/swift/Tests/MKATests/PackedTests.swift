// Tests of what stands between the library's bytes and a stream's events: bytes that are none, and rings that come early.
// Knows no engine.

import Foundation
import Testing

@testable import MKA

/// The events that `bytes` hold.
func unpacked<E: Unpacked>(_: E.Type, _ bytes: [UInt8]) throws -> [E] {
    try bytes.withUnsafeBytes { raw in
        var (packed, events) = (Packed(raw), [E]())
        while !packed.isEmpty { events.append(try E.next(from: &packed)) }
        return events
    }
}

@Test func tokensAreReadOneBehindTheOther() throws {
    let bytes: [UInt8] = [1, 2, 0, 0, 0, 0xC3, 0xA9, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0x61]
    let texts = try unpacked(Event.self, bytes).map { event -> String? in
        if case .token(let token) = event { token.text } else { nil }
    }
    #expect(texts == ["é", "", "a"])
}

@Test func bytesThatHoldNoEventAreAnErrorThatNamesThem() {
    for (bytes, expected) in [
        ([1, 9, 0, 0, 0, 0x61], "1 bytes left at byte 5, expected 9"), ([7], "kind 7 at byte 0"),
        ([3, 3], "StopReason 3"), ([1, 0], "expected 4"),
    ] as [([UInt8], String)] {
        #expect {
            try unpacked(Event.self, bytes)
        } throws: { error in
            (error as? MKAError)?.message.contains(expected) == true
        }
    }
    #expect(throws: MKAError.self) { try unpacked(FeedEvent.self, [1, 0, 0, 0, 0]) }
}

@Test func noBytesCrash() {
    var random = SystemRandomNumberGenerator()
    for _ in 0..<2_000 {
        var bytes = (0..<Int.random(in: 0...240, using: &random)).map { _ in UInt8.random(in: 0...4, using: &random) }
        if let first = bytes.indices.first { bytes[first] = .random(in: 1...5, using: &random) }
        _ = try? unpacked(Event.self, bytes)
        _ = try? unpacked(FeedEvent.self, bytes)
    }
}

@Test func aRingThatComesEarlyIsNotMissedAndAnEndStays() async {
    let waiting = Waiting()
    waiting.arm()
    waiting.ring()
    await waiting.wait()
    waiting.arm()
    async let first: Void = waiting.wait()
    async let second: Void = waiting.wait()
    Task.detached { waiting.ring(ends: true) }
    _ = await (first, second)
    waiting.arm()
    await waiting.wait()
}
