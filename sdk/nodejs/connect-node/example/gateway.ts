// A WebSocket gateway in 150 lines: it speaks the part of docs/client-protocol.md that needs no tokens and no positions in rooms.
//
//   NODE_ID=node-ts GRPC_PORT=50062 HTTP_PORT=8090 CONTROLLER_ADDRESS=localhost:50051 ETCD_ENDPOINTS=localhost:2379 node gateway.js
import { createServer } from "node:http";
import { ConnectNode, RefusedError, type Message, type Push, type Session } from "@push-manager/connect-node";
import { WebSocketServer, type WebSocket } from "ws";

const env = (name: string, otherwise: string): string => process.env[name] ?? otherwise;
const nodeId = env("NODE_ID", "connect-node-ts");
const host = env("LISTEN_ADDRESS", "127.0.0.1");
const controller = env("CONTROLLER_ADDRESS", "localhost:50051");
const endpoints = env("ETCD_ENDPOINTS", "localhost:2379").split(",").filter((e) => e !== "");

const node = new ConnectNode({
  nodeId,
  listen: `${host}:${env("GRPC_PORT", "50052")}`,
  // Both may be empty: then the node stands alone, for the conformance test.
  ...(endpoints.length > 0 ? { etcd: { endpoints } } : {}),
  ...(controller !== "" ? { controller } : {}),
  onState: (part, up, why) => console.error(`${part}: ${up ? "ok" : why}`),
});

const types = ["text", "audio", "video", "translation", "system"];
const utf8 = new TextDecoder("utf-8", { fatal: true });
const bodies = new WeakMap<Message, object>(); // A push to a room is put into words once.

function bodyOf(m: Message): object {
  let body = bodies.get(m);
  if (body === undefined) {
    let data: object;
    try {
      data = { content: utf8.decode(m.data) };
    } catch {
      data = { content_base64: Buffer.from(m.data).toString("base64") };
    }
    body = { type: types[m.type] ?? String(m.type), room_id: m.roomId, timestamp: m.timestamp, data, metadata: m.metadata, ...(m.broadcast ? { broadcast: true } : {}) };
    bodies.set(m, body);
  }
  return body;
}

/** What the client gets. Only one that has asked for it sees ids and numbers to acknowledge. */
function frameOf(user: string, { message, ack, replayed }: Push, acks: boolean): string {
  const extra = acks ? { ...(message.id !== "" ? { id: message.id } : {}), ...(ack > 0 ? { ack } : {}), ...(replayed ? { replayed: true } : {}) } : {};
  return JSON.stringify({ ...bodyOf(message), user_id: user, ...extra });
}

const closeCodes = { slow: 4429, dead: 1001, broken: 1011, going: 1001, disconnected: 4000 } as const;

function serve(ws: WebSocket, query: URLSearchParams): void {
  const user = query.get("user_id") ?? "";
  const attributes = Object.fromEntries([...query].filter(([name]) => name.startsWith("attr.")).map(([name, value]) => [name.slice(5), value]));
  const room = query.get("room_id") ?? "";
  const acks = query.get("ack") === "1";
  const say = (message: object): void => {
    if (ws.readyState === ws.OPEN) ws.send(JSON.stringify(message));
  };
  let session: Session;
  try {
    session = node.connect({
      send: (push) => ws.send(frameOf(user, push, acks)),
      buffered: () => ws.bufferedAmount,
      close: (why, said) => {
        ws.close(said?.code ?? closeCodes[why], said?.reason ?? why);
        setTimeout(() => ws.terminate(), 1000).unref();
      },
      ping: () => ws.ping(),
      joined: (joined) => {
        if (joined !== "") say({ type: "joined", room_id: joined });
        else if (room === "") say({ type: "ready", user_id: user, node_id: nodeId });
      },
      left: (left) => say({ type: "left", room_id: left }),
      refused: (refused, why) => {
        say({ type: "error", room_id: refused, message: why });
        if (refused === "") ws.close(1013, "refused");
      },
    }, { user, name: query.get("user_name") ?? "", acks, attributes });
    if (room !== "") session.join(room);
  } catch (error) {
    if (error instanceof RefusedError) ws.close(error.code, error.reason);
    else ws.close(1008, error instanceof Error ? error.message.slice(0, 120) : "refused");
    return;
  }
  // A client that is silent is asked, and cut off if it stays so.
  let silent = 0;
  const asking = setInterval(() => (++silent > 2 ? ws.terminate() : ws.ping()), 25_000);
  ws.on("close", () => clearInterval(asking));
  ws.on("pong", () => {
    silent = 0;
    session.heard();
  });
  ws.on("error", () => session.end());
  ws.on("close", () => session.end());
  ws.on("message", (data) => {
    silent = 0;
    session.heard();
    try {
      const m = JSON.parse(String(data)) as { type?: unknown; room_id?: unknown; ack?: unknown };
      if (m.type === "ack") {
        if (!session.ack(Number(m.ack))) say({ type: "error", field: "ack", message: "acknowledges more than it was sent" });
      } else if (m.type === "join") {
        session.join(String(m.room_id));
      } else if (m.type === "leave") {
        session.leave(String(m.room_id));
      } else if (m.type === "ping") {
        say({ type: "pong" });
      }
    } catch (error) {
      say({ type: "error", message: error instanceof Error ? error.message : "malformed" });
    }
  });
}

const http = createServer((request, response) => {
  const ready = request.url === "/readyz" ? node.isReady : request.url === "/healthz";
  response.writeHead(ready ? 200 : 503, { "content-type": "text/plain" }).end(ready ? "ok\n" : "not ready\n");
});
const sockets = new WebSocketServer({ noServer: true, maxPayload: 64 << 10, perMessageDeflate: false });
http.on("upgrade", (request, socket, head) => {
  const url = new URL(request.url ?? "/", "http://gateway");
  if (url.pathname !== "/ws") {
    socket.end("HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n");
    return;
  }
  sockets.handleUpgrade(request, socket, head, (ws) => serve(ws, url.searchParams));
});

const address = await node.start();
http.listen(Number(env("HTTP_PORT", "8080")), host, () => console.error(`node ${nodeId} at ${address}, clients at ${host}:${env("HTTP_PORT", "8080")}`));

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  process.once(signal, () => {
    void node.stop().then(() => process.exit(0));
  });
}
