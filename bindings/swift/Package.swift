// swift-tools-version: 6.0
// The package MKA: hand-written Swift over code that uniffi generates, over the library built from Rust.
// Linux links the shared library that cargo built (-L); Apple platforms take an XCFramework (scripts/build-xcframework.sh).

import PackageDescription

#if os(Linux) && !APPLE_MANIFEST
    let core: Target = .systemLibrary(name: "CMKA", path: "Sources/CMKA")
#else
    let core: Target = .binaryTarget(name: "CMKA", path: "CMKA.xcframework")
#endif

let package = Package(
    name: "MKA",
    platforms: [.macOS(.v13), .iOS(.v16)],
    products: [.library(name: "MKA", targets: ["MKA"])],
    targets: [
        core,
        // Generated: Swift 5 mode, which is what uniffi writes for.
        .target(name: "MKABindings", dependencies: ["CMKA"], swiftSettings: [.swiftLanguageMode(.v5)]),
        .target(name: "MKA", dependencies: ["MKABindings", "CMKA"]),
        .executableTarget(name: "Chat", dependencies: ["MKA"], path: "Examples/Chat"),
        .executableTarget(name: "LongDocument", dependencies: ["MKA"], path: "Examples/LongDocument"),
        .executableTarget(name: "AgentLoop", dependencies: ["MKA"], path: "Examples/AgentLoop"),
        .executableTarget(
            name: "Conversation", dependencies: ["MKA"], path: "Examples/Conversation"),
        .executableTarget(name: "Overhead", dependencies: ["MKA"], path: "Examples/Overhead"),
        .testTarget(name: "MKATests", dependencies: ["MKA"]),
    ]
)
