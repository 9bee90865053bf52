// Owns the error of the package: a kind to branch on and a text to read.
// Knows no operation.

import Foundation
import MKABindings

/// An error of mka: operation, expected, got.
public struct MKAError: Error, LocalizedError, Sendable, Equatable, CustomStringConvertible {
    /// What a caller can do about it.
    public enum Kind: Sendable {
        /// An argument is outside its range: correct the call.
        case invalidArgument
        /// The thing asked for does not exist: a file, a model, a turn.
        case notFound
        /// Somebody else has it: another process the store, another handle or stream the session.
        case locked
        /// Bytes on disk are damaged.
        case corrupted
        /// Intact, but made by another model, embedder or format version.
        case incompatible
        /// The model's files or its forward pass are at fault.
        case model
        /// The device is missing or failed.
        case device
        /// Memory ran out.
        case outOfMemory
        /// Reading or writing failed.
        case storage
        /// The work was cancelled by its caller, or words that it may have read were forgotten meanwhile.
        case cancelled
        /// A fault of the library itself: please report it.
        case `internal`

        /// By the library's name for it.
        init(named name: String) {
            self =
                switch name {
                case "InvalidArgument": .invalidArgument
                case "NotFound": .notFound
                case "Locked": .locked
                case "Corrupted": .corrupted
                case "Incompatible": .incompatible
                case "Model": .model
                case "Device": .device
                case "OutOfMemory": .outOfMemory
                case "Storage": .storage
                case "Cancelled": .cancelled
                default: .internal
                }
        }
    }

    /// What a caller can do about it.
    public let kind: Kind
    /// Operation, expected, got.
    public let message: String

    public var errorDescription: String? { message }
    public var description: String { message }

    init(_ kind: Kind, _ message: String) {
        self.kind = kind
        self.message = message
    }

    init(_ error: any Error) {
        switch error {
        case let error as MKAError: self = error
        case MkaError.InvalidArgument(let message): self.init(.invalidArgument, message)
        case MkaError.NotFound(let message): self.init(.notFound, message)
        case MkaError.Locked(let message): self.init(.locked, message)
        case MkaError.Corrupted(let message): self.init(.corrupted, message)
        case MkaError.Incompatible(let message): self.init(.incompatible, message)
        case MkaError.Model(let message): self.init(.model, message)
        case MkaError.Device(let message): self.init(.device, message)
        case MkaError.OutOfMemory(let message): self.init(.outOfMemory, message)
        case MkaError.Storage(let message): self.init(.storage, message)
        case MkaError.Cancelled(let message): self.init(.cancelled, message)
        case MkaError.Internal(let message): self.init(.internal, message)
        default: self.init(.internal, String(describing: error))
        }
    }
}

/// Runs `work`; what it throws becomes an ``MKAError``.
func translated<T>(_ work: () throws -> T) throws(MKAError) -> T {
    do {
        return try work()
    } catch {
        throw MKAError(error)
    }
}

/// Awaits `work`; what it throws becomes an ``MKAError``.
func translated<T: Sendable>(_ work: @Sendable () async throws -> T) async throws(MKAError) -> T {
    do {
        return try await work()
    } catch {
        throw MKAError(error)
    }
}
