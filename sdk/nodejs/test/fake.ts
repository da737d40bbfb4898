// A Push-Manager that says what a test wants: for what a real one says only in bad times.
import { create, toBinary } from "@bufbuild/protobuf";
import { BinaryReader, BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { anyPack, DurationSchema, type Any } from "@bufbuild/protobuf/wkt";
import { Metadata, Server, ServerCredentials, status, type sendUnaryData, type ServerDuplexStream, type ServerUnaryCall } from "@grpc/grpc-js";

/** An Any of a google.rpc message, by hand: the package keeps its generated code to itself. */
const detail = (name: string, value: Uint8Array): Any => {
  const any = anyPack(DurationSchema, create(DurationSchema));
  any.typeUrl = `type.googleapis.com/google.rpc.${name}`;
  any.value = value;
  return any;
};

const packed = (number: number, bytes: Uint8Array): Uint8Array => new BinaryWriter().tag(number, WireType.LengthDelimited).bytes(bytes).finish();
const join = (...all: Uint8Array[]): Uint8Array => Buffer.concat(all);

export interface Refusal {
  code: status;
  reason?: string;
  /** Milliseconds; undefined: without a RetryInfo. */
  retryAfter?: number;
}

/** An encoded google.rpc.Status. */
function statusOf(r: Refusal): Uint8Array {
  const details: Any[] = [];
  if (r.reason !== undefined) details.push(detail("ErrorInfo", join(packed(1, Buffer.from(r.reason)), packed(2, Buffer.from("push-manager")))));
  if (r.retryAfter !== undefined) {
    const delay = toBinary(DurationSchema, create(DurationSchema, { seconds: BigInt(Math.floor(r.retryAfter / 1000)), nanos: (r.retryAfter % 1000) * 1e6 }));
    details.push(detail("RetryInfo", packed(1, delay)));
  }
  const w = new BinaryWriter().tag(1, WireType.Varint).int32(r.code).tag(2, WireType.LengthDelimited).string("refused");
  for (const d of details) w.tag(3, WireType.LengthDelimited).bytes(join(packed(1, Buffer.from(d.typeUrl)), packed(2, d.value)));
  return w.finish();
}

/** A reply of any kind: one target, delivered. */
export const delivered: Uint8Array = new BinaryWriter()
  .tag(1, WireType.Varint).bool(true)
  .tag(10, WireType.LengthDelimited).fork().tag(1, WireType.Varint).int32(1).tag(2, WireType.Varint).int32(1).join()
  .finish();

/** The fields of a message with length-delimited values. */
function fieldsOf(b: Uint8Array): Map<number, Uint8Array> {
  const all = new Map<number, Uint8Array>();
  const r = new BinaryReader(b);
  while (r.pos < r.len) {
    const [number, type] = r.tag();
    if (type === WireType.LengthDelimited) all.set(number, r.bytes());
    else r.skip(type);
  }
  return all;
}

/** A push that came. */
export interface Came {
  target: string;
  text: string;
  metadata: Metadata;
  bytes: string;
}

function cameOf(request: Uint8Array, metadata: Metadata): Came {
  const f = fieldsOf(request);
  const content = fieldsOf(f.get(2) ?? new Uint8Array());
  const str = (b: Uint8Array | undefined): string => Buffer.from(b ?? []).toString();
  return { target: str(f.get(1)), text: str(content.get(2)), metadata, bytes: Buffer.from(request).toString("hex") };
}

/** What is answered: a reply, a refusal, "break" (the call ends without a word of Push-Manager's), or "hang". */
export type Answer = Uint8Array | Refusal | "break" | "hang";

export class FakePushManager {
  readonly came: Came[] = [];
  address = "";
  private readonly server = new Server();
  private readonly streams = new Set<ServerDuplexStream<Buffer, Uint8Array>>();

  constructor(private readonly answer: (came: Came, n: number) => Answer) {
    const method = (name: string): object => ({
      path: `/pubsub.PushManagerService/${name}`, requestStream: name === "PushStream", responseStream: name === "PushStream",
      requestSerialize: (b: Buffer) => b, requestDeserialize: (b: Buffer) => b, responseSerialize: (b: Uint8Array) => Buffer.from(b), responseDeserialize: (b: Buffer) => b,
    });
    const unary = (call: ServerUnaryCall<Buffer, Uint8Array>, callback: sendUnaryData<Uint8Array>): void => {
      const a = this.take(call.request, call.metadata);
      if (a === "hang") return;
      if (a instanceof Uint8Array) callback(null, a);
      else callback(a === "break" ? { code: status.UNAVAILABLE, details: "connection lost" } : this.errorOf(a));
    };
    const names = ["PushToUser", "PushToUsers", "PushToRoom", "PushToRooms", "BroadcastMessage"];
    this.server.addService(Object.fromEntries([...names, "PushStream"].map((n) => [n, method(n)])) as never, {
      ...Object.fromEntries(names.map((n) => [n, unary])), PushStream: (call: ServerDuplexStream<Buffer, Uint8Array>) => this.stream(call),
    } as never);
  }

  async start(): Promise<this> {
    const port = await new Promise<number>((resolve, reject) => {
      this.server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (e, p) => (e === null ? resolve(p) : reject(e)));
    });
    this.address = `127.0.0.1:${port}`;
    return this;
  }

  stop(): void {
    this.server.forceShutdown();
  }

  private take(request: Uint8Array, metadata: Metadata): Answer {
    const came = cameOf(request, metadata);
    this.came.push(came);
    return this.answer(came, this.came.length);
  }

  private errorOf(r: Refusal): { code: status; details: string; metadata: Metadata } {
    const metadata = new Metadata();
    metadata.set("grpc-status-details-bin", Buffer.from(statusOf(r)));
    return { code: r.code, details: "refused", metadata };
  }

  private stream(call: ServerDuplexStream<Buffer, Uint8Array>): void {
    this.streams.add(call);
    call.on("error", () => undefined);
    call.on("end", () => call.end());
    call.on("data", (frame: Buffer) => {
      const r = new BinaryReader(frame);
      while (r.pos < r.len) {
        r.tag();
        const push = new BinaryReader(r.bytes());
        push.tag();
        const id = push.uint32();
        const [field] = push.tag();
        const a = this.take(push.bytes(), call.metadata);
        if (a === "hang") continue;
        if (a === "break") {
          call.emit("error", { code: status.UNAVAILABLE, details: "connection lost" });
          return;
        }
        const w = new BinaryWriter().tag(1, WireType.Varint).uint32(id);
        if (a instanceof Uint8Array) w.tag(field + 1, WireType.LengthDelimited).bytes(a);
        else w.tag(2, WireType.LengthDelimited).bytes(statusOf(a));
        call.write(packed(10, w.finish()));
      }
    });
  }
}
